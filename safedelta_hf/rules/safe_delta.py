"""Safe Delta: selection of columns under a safety budget, with compensation (arXiv 2505.12038)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.compensation import joint_compensation, sequential_compensation
from safedelta_hf.core.curvature import Curvature, factorise
from safedelta_hf.core.low_rank import dense
from safedelta_hf.core.selection import budget, select_blockwise, select_columns
from safedelta_hf.core.transform import DeltaMatrix, Dense, KeepColumns, Transform
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.rule import LayerMoments, Strength, TransformRule, number

Compensation = Literal["joint", "sequential", "none"]


@dataclass(frozen=True, kw_only=True)
class SafeDelta(TransformRule):
    """The published rule: keep the columns with the most utility per safety cost, compensate in the rest.

    Args:
        strength: `s`, the safety budget; 0 returns the base weights, larger values keep more of the fine-tuning.
            The paper uses 0.1 for 7B models; small models with large deltas need 10 to 100 and more. "auto" measures.
        compensation: "joint" solves for the least quadratic loss over all columns that are not kept,
            "sequential" is the published sweep, "none" leaves them at the base.
        exclude_top: Share of each block's columns, the most expensive in safety, that are never kept, in [0, 1];
            of linear layers only.
        damping: Share of the mean diagonal added to the Hessian, positive.
        block: Columns per block of the published sweep; each block has a budget of its own. A multiple of 4.

    Raises:
        ConfigurationError: A value is outside its range or not a number.
    """

    strength: Strength = 0.1
    compensation: Compensation = "joint"
    exclude_top: float = 0.15
    damping: float = 0.01
    block: int = 2048

    name: ClassVar[str] = "safe_delta"
    mildest: ClassVar[float] = 1e12
    search_range: ClassVar[tuple[float, float]] = (1e5, 1e-3)
    factors_serve_any_strength: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("exclude_top", "in [0, 1]", lambda value: 0 <= value <= 1)
        self._require("damping", "positive and finite", lambda value: 0 < value < math.inf)
        if self.compensation not in get_args(Compensation):
            raise ConfigurationError(
                f"SafeDelta: compensation={self.compensation!r} is not one of {list(get_args(Compensation))}"
            )
        if not isinstance(self.block, int) or self.block < 4 or self.block % 4:
            raise ConfigurationError(f"SafeDelta: block={self.block!r} must be a positive multiple of 4, such as 2048")

    def _check_strength(self) -> None:
        self._require("strength", "at least 0, or 'auto'", lambda value: value >= 0)

    @override
    def factorise(self, moments: LayerMoments) -> Curvature | Tensor:
        # Where inputs do not mix, the diagonal has the pivots itself. It is never inverted, and needs no damping.
        hessian = dense(moments.safety)
        return hessian if hessian.ndim == 1 else factorise(hessian, self.damping)

    @override
    def transform(self, factors: Curvature | Tensor, delta: DeltaMatrix) -> Transform:
        if isinstance(factors, Tensor):
            return self._diagonal_transform(factors, delta)
        kept = select_blockwise(
            factors,
            delta.column_energy,
            rows=delta.rows,
            strength=number(self.strength),
            exclude_top=self.exclude_top,
            block=self.block,
        )
        if self.compensation == "none" or not kept.any() or kept.all():
            return KeepColumns(kept=kept, response=None, notes=factors.notes)
        compensated = joint_compensation if self.compensation == "joint" else sequential_compensation
        return compensated(factors, kept)

    def _diagonal_transform(self, pivots: Tensor, delta: DeltaMatrix) -> Transform:
        # What the safety data never used is free. With a diagonal `H` nothing can compensate for anything else, and
        # there is no sweep: hence no blocks, and no exclusion, which would never let a bias (one column) be kept.
        used = pivots > 0
        kept = ~used
        if used.any():
            limit = budget(pivots[used], number(self.strength), delta.rows)
            kept[used] = select_columns(pivots[used], delta.column_energy()[used], limit, exclude_top=0.0)
        return Dense(matrix=kept.to(torch.float32))
