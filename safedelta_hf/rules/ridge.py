"""Ridge: shrink each direction of input space by how much the safety data uses it."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from safedelta_hf.core.ridge import shrinkage
from safedelta_hf.core.transform import Transform
from safedelta_hf.rules.rule import LayerMoments, Shrinking, number


@dataclass(frozen=True, kw_only=True)
class Ridge(Shrinking):
    """The optimum that selection approximates: `D* = D (I + lam H)^-1`.

    It minimises `1/2 |D* - D|^2 + lam/2 tr(D* H D*^T)`: no column is dropped or kept whole, and for a given quadratic
    safety loss no other adjustment stays closer to the fine-tuned weights. One `lam` for all layers means that every
    layer trades at the same price.

    Args:
        strength: `lam`; 0 returns the fine-tuned weights, larger values keep less. "auto" measures.

    Raises:
        ConfigurationError: The strength is no number at least 0.
    """

    name: ClassVar[str] = "ridge"
    search_range: ClassVar[tuple[float, float]] = (1e-5, 1e6)

    @override
    def factorise(self, moments: LayerMoments) -> Transform:
        return shrinkage(moments.safety, None, number(self.strength))
