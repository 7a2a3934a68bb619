"""SafePatching, a reconstruction: forget harm in some entries, loosen refusals in others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.merging import drop, largest_entries, random_entries
from safedelta_hf.errors import ConfigurationError, MergeError, NumericalError
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule, Source, WeightReader, own_seed, require_source
from safedelta_hf.rules.rule import number

NEEDS = (
    "it needs two models tuned on harmful data, and the gradients at both, in Python; the command line cannot name them"
)


@dataclass(frozen=True)
class Gradients:
    """Gradients of a loss by canonical name of the parameter.

    Attributes:
        values: The gradients, each in the shape of its parameter.
        source: Where they come from, for reports and errors.
    """

    values: Mapping[str, Tensor]
    source: str = "gradients in memory"

    def read(self, name: str) -> Tensor:
        """Find the gradient of one parameter.

        Args:
            name: Its canonical name.

        Returns:
            The gradient.

        Raises:
            MergeError: There is none.
        """
        if name not in self.values:
            raise MergeError(f"{name}: none in {self.source}; give zeros where the loss does not depend on a parameter")
        return self.values[name]


@dataclass(frozen=True, kw_only=True)
class SafePatch(MergeRule):
    """Add the parts of two patches that matter to one of them alone (SafePatching, arXiv 2405.13820).

    **A reconstruction**: there is no published code, and the values of the constants are not published either, so that
    none has a default. With `P_s = W_forget - W0` (gradient ascent on harmful pairs) and `P_o = W_loosen - W0`
    (descent on them), each thinned to a random share of its entries, and `A`, `B` those of highest SNIP score
    `|W dL/dW|` in each: `D* = D + strength (P_s on A without B + P_o on B without A)`.

    Args:
        strength: 0 returns the fine-tuned weights, 1 is as published. "auto" measures.
        forget: A model tuned from the base by gradient ascent on harmful pairs.
        loosen: A model tuned from the base by gradient descent on them.
        forget_gradients: `dL/dW` of the harmful questions at the first model: `Gradients`, or a reader of them.
        loosen_gradients: The same at the second.
        keep_forget: Share of all entries that is `A`, in [0, retention].
        keep_loosen: Share of all entries that is `B`, in [0, retention].
        retention: Probability with which each entry of a patch is retained at all, in (0, 1].
        rescale: Whether what is retained is divided by that, as in DARE.
        seed: Of what is retained, together with the parameter's name.

    Raises:
        ConfigurationError: A model or a constant is missing, or outside its range.
    """

    forget: Source | None = None
    loosen: Source | None = None
    forget_gradients: WeightReader | None = None
    loosen_gradients: WeightReader | None = None
    keep_forget: float | None = None
    keep_loosen: float | None = None
    retention: float | None = None
    rescale: bool | None = None
    seed: int | None = None

    name: ClassVar[str] = "safe_patch"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("forget", "loosen"):
            require_source("SafePatch", field, getattr(self, field), NEEDS)
        for field in ("forget_gradients", "loosen_gradients"):
            if not hasattr(getattr(self, field), "read"):
                raise ConfigurationError(f"SafePatch: {field}={getattr(self, field)!r} has no gradients; {NEEDS}")
        self._require("retention", "above 0 and at most 1", lambda value: 0 < value <= 1)
        for field in ("keep_forget", "keep_loosen"):
            self._require(field, f"in [0, retention={self.retention}]", lambda value: 0 <= value <= self._retained)
        if not isinstance(self.rescale, bool) or not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigurationError(
                f"SafePatch: rescale={self.rescale!r} must be True or False and seed={self.seed!r} an integer; the "
                "paper gives neither"
            )

    @property
    @override
    def sources(self) -> tuple[Source, ...]:
        assert self.forget is not None and self.loosen is not None, "checked when it was made"
        return self.forget, self.loosen

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        gradients = (self.forget_gradients, self.loosen_gradients)
        shares = (self.keep_forget or 0.0, self.keep_loosen or 0.0)
        (forget, harm), (loosen, refusals) = (
            self._chosen(place, parameter, patch, gradient, share)
            for place, (patch, gradient, share) in enumerate(zip(parameter.others, gradients, shares, strict=True))
        )
        patch = torch.where(harm & ~refusals, forget, 0.0) + torch.where(refusals & ~harm, loosen, 0.0)
        counts = [int(mask.sum()) for mask in (harm & ~refusals, refusals & ~harm, harm & refusals)]
        note = f"patched {counts[0]} entries to forget and {counts[1]} to loosen, {counts[2]} claimed by both"
        return Merged(parameter.delta + number(self.strength) * patch, (note,))

    @property
    def _retained(self) -> float:
        assert self.retention is not None, "checked when it was made"
        return self.retention

    def _chosen(
        self, place: int, parameter: MergeInput, patch: Tensor, gradients: WeightReader | None, share: float
    ) -> tuple[Tensor, Tensor]:
        # A patch of its retained entries, and which of those have the highest scores.
        assert gradients is not None and self.seed is not None, "checked when it was made"
        drawn = random_entries(patch.shape, self._retained, own_seed(self.seed, f"{place}:{parameter.name}"))
        kept = drawn.to(patch.device)
        thinned = drop(patch, kept, self._retained, rescale=bool(self.rescale))
        gradient = gradients.read(parameter.name).to(patch)
        if gradient.shape != patch.shape:
            raise MergeError(
                f"{parameter.name}: {list(gradient.shape)} in {gradients.source}, {list(patch.shape)} in the base; "
                "give the gradients of this model"
            )
        if not torch.isfinite(gradient).all():
            raise NumericalError(f"{parameter.name}: holds NaN or Inf in {gradients.source}; take it in float32")
        scores = ((parameter.base + thinned) * gradient).abs()
        scores = torch.where(kept, scores, 0.0)
        # What the loss does not depend on, or was not retained, is never among the highest.
        count = min(int(share * patch.numel()), int(scores.count_nonzero()))
        return thinned, largest_entries(scores, count)
