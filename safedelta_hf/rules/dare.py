"""DARE: drop entries of the delta at random."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from safedelta_hf.core.merging import drop, random_entries
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule


@dataclass(frozen=True, kw_only=True)
class Dare(MergeRule):
    """Drop each entry of the delta with probability `p = strength / (1 + strength)` (arXiv 2311.03099).

    The published method divides what is left by `1 - p`. That keeps the whole delta in expectation, harm included, and
    adds noise that grows without bound with `p`: the base is never reached. So the default is not to rescale; the
    expectation is then that of `Scale`, and the base is the limit.

    Args:
        strength: 0 returns the fine-tuned weights, 1 drops half of the entries. "auto" measures.
        rescale: Whether to divide what is left by `1 - p`, as published.
        seed: Of the choice, together with the parameter's name. A larger strength drops what a smaller one drops.

    Raises:
        ConfigurationError: A value is outside its range or of the wrong type.
    """

    rescale: bool = False
    seed: int = 0

    name: ClassVar[str] = "dare"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rescale, bool):
            raise ConfigurationError(f"Dare: rescale={self.rescale!r} must be True or False")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigurationError(f"Dare: seed={self.seed!r} must be an integer")

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        delta = parameter.delta
        own_seed = hashlib.sha256(f"{self.seed}:{parameter.name}".encode()).digest()[:8]
        kept = random_entries(delta.shape, self._share, int.from_bytes(own_seed, "little"))
        return Merged(drop(delta, kept.to(delta.device), self._share, rescale=self.rescale))
