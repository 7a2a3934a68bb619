"""DARE: drop entries of the delta at random."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from safedelta_hf.core.merging import drop, random_entries
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule, own_seed


@dataclass(frozen=True, kw_only=True)
class Dare(MergeRule):
    """Drop entries of the delta at random (arXiv 2311.03099).

    Without a density each entry is dropped with probability `p = strength / (1 + strength)`. With one, each is kept
    with that probability, and what is left is scaled by the weight `1 / (1 + strength)`, as Farn et al. 2024 (arXiv
    2412.19512) merged: `W0 + l DARE_p(D)`.

    The published method divides what is left by `1 - p`. That keeps the whole delta in expectation, harm included, and
    adds noise that grows without bound with `p`: the base is never reached, unless a density fixes `p`. So the default
    is not to rescale; the expectation is then that of `Scale`, and the base is the limit.

    Args:
        strength: Without a density 0 returns the fine-tuned weights, 1 drops half of the entries. With one 0 is the
            published method, 1 halves its result. "auto" measures.
        density: Share of entries that is kept, in (0, 1], at every strength; None lets the strength decide.
        rescale: Whether to divide what is left by `1 - p`, as published.
        seed: Of the choice, together with the parameter's name. A larger share keeps all that a smaller one keeps.

    Raises:
        ConfigurationError: A value is outside its range or of the wrong type.
    """

    density: float | None = None
    rescale: bool = False
    seed: int = 0

    name: ClassVar[str] = "dare"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None:
            self._require("density", "above 0 and at most 1", lambda value: 0 < value <= 1)
        if not isinstance(self.rescale, bool):
            raise ConfigurationError(f"Dare: rescale={self.rescale!r} must be True or False")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigurationError(f"Dare: seed={self.seed!r} must be an integer")

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        delta = parameter.delta
        density, weight = (self._share, 1.0) if self.density is None else (self.density, self._share)
        kept = random_entries(delta.shape, density, own_seed(self.seed, parameter.name))
        return Merged(weight * drop(delta, kept.to(delta.device), density, rescale=self.rescale))
