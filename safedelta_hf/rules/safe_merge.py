"""SafeMERGE: merge with a safety-tuned model in the layers that left the alignment subspace."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from safedelta_hf.core.merging import alignment_cosine, chance_cosine
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule, Source, require_source

NEEDS = (
    "it needs the model before its alignment, and a safety-tuned model or LoRA on the base: "
    "SafeMerge(unaligned='folder', safe='folder') in Python; the command line cannot name them"
)

ROUNDING = 1e-6
"""How near to 1 two cosines of float32 matrices cannot be told apart."""


@dataclass(frozen=True, kw_only=True)
class SafeMerge(MergeRule):
    """Leave a layer as tuned, or merge its delta with that of a safety-tuned model (SafeMERGE, arXiv 2503.17239).

    With `V` the aligned (base) minus the unaligned weight and `C = V V^T / |V|`, a layer is left as tuned if
    `cos(D, C D)` reaches the threshold. The others get `D* = a D + (1 - a) D_safe` with `a = 1 / (1 + strength)`; the
    deltas themselves are merged, not the factors of adapters one by one. As in the authors' code, a layer that the
    alignment did not change has the cosine 0.

    A delta that knows nothing of the alignment has a cosine too: `1 / sqrt(1 + out / in)` with a random `V`, 0.71 in a
    square layer, above the published threshold. The report has that value for each layer's own `V` beside its cosine,
    and `relative` measures from it. Parameters of one column (norm scales, biases) are left as tuned: their cosine is
    that of two vectors, near 0 by chance, so that every one of them would be merged; the authors have none of them.

    Args:
        strength: 0 returns the fine-tuned weights, 0.25 are the published weights 0.8 and 0.2, larger values approach
            the safety-tuned model in the chosen layers. "auto" measures.
        threshold: Cosine below which a layer is merged; in [0, 1]. 0.35 is that of the authors' code.
        relative: Whether the threshold is compared with `(cosine - chance) / (1 - chance)`, which is 0 for a random
            delta and 1 for one within the alignment's directions, in place of the cosine.
        vectors: Whether parameters of one column are compared and merged too.
        unaligned: The model before its alignment: a folder, a model, or a reader.
        safe: A safety-tuned model that started from the base: a folder of a model or of a LoRA, a model, or a reader.

    Raises:
        ConfigurationError: A value is outside its range, or one of the two models is missing.
    """

    threshold: float = 0.35
    relative: bool = False
    vectors: bool = False
    unaligned: Source | None = None
    safe: Source | None = None

    name: ClassVar[str] = "safe_merge"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("threshold", "in [0, 1]", lambda value: 0 <= value <= 1)
        for field in ("relative", "vectors"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigurationError(f"SafeMerge: {field}={getattr(self, field)!r} must be True or False")
        require_source("SafeMerge", "unaligned", self.unaligned, NEEDS)
        require_source("SafeMerge", "safe", self.safe, NEEDS)

    @property
    @override
    def sources(self) -> tuple[Source, ...]:
        assert self.unaligned is not None and self.safe is not None, "checked when it was made"
        return self.unaligned, self.safe

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        unaligned, safe = parameter.others
        alignment = parameter.matrices(-unaligned)
        alike, chance = alignment_cosine(parameter.matrices(parameter.delta), alignment), chance_cosine(alignment)
        note = f"cosine with the alignment subspace {alike:.3f}, by chance {chance:.3f}"
        if alignment.shape[-1] == 1 and not self.vectors:
            return Merged(parameter.delta, (f"{note}, of one column and left as tuned",))
        if self._measured(alike, chance) >= self.threshold or self._share == 1:
            return Merged(parameter.delta, (f"{note}, left as tuned",))
        kept = self._share * parameter.delta + (1 - self._share) * safe
        return Merged(kept, (f"{note}, merged with the safety-tuned model",))

    def _measured(self, alike: float, chance: float) -> float:
        if not self.relative:
            return alike
        # Where chance alone gives 1, every direction is the alignment's, and nothing can leave it.
        return (alike - chance) / (1 - chance) if chance < 1 - ROUNDING else 1.0
