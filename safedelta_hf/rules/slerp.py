"""SLERP: interpolate along the arc between base and fine-tuned weight."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from safedelta_hf.core.merging import slerp
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule


@dataclass(frozen=True, kw_only=True)
class Slerp(MergeRule):
    """Spherical interpolation of base and fine-tuned weight, each parameter as one vector.

    The share of the way is `t = 1 / (1 + strength)`, as of `Scale`, from which it differs only where the fine-tuning
    turned a weight by more than 1.8 degrees (Farn et al. 2024, arXiv 2412.19512; conventions of mergekit).

    Args:
        strength: 0 returns the fine-tuned weights, 1 the middle of the arc. "auto" measures.

    Raises:
        ConfigurationError: The strength is no number at least 0.
    """

    name: ClassVar[str] = "slerp"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e2)

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        return Merged(slerp(parameter.base, parameter.delta, self._share))
