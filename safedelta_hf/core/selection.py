"""The published selection: keep what costs least safety per unit of utility, until the budget is spent.

Keeping entry m of a row costs `d_m^2 / U_mm^2` and gains `d_m^2`; the ratio depends on the column alone, so the greedy
choice takes whole columns in increasing order of the pivot `1 / U_mm^2`, and cuts at most one column per block.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safedelta_hf.core.compensation import SweepRatios, SweepResidual
from safedelta_hf.core.curvature import Curvature
from safedelta_hf.core.transform import Transform

PAPER_ROWS = 4096
"""Rows of the layers for which the published strength was tuned; the budget scales with `out / PAPER_ROWS`."""


def budget(pivots: Float[Tensor, " i"], strength: float, rows: int) -> float:
    """Safety budget of one block, `mean(1/U_mm^2) * (s/2) * (out/4096)`, as in the published code.

    Args:
        pivots: [block] `1 / U_mm^2`.
        strength: `s`.
        rows: Output features of the layer.

    Returns:
        The budget, in units of the summed cost.
    """
    return float(pivots.mean()) * strength / 2 * rows / PAPER_ROWS


def keepable(size: int, exclude_top: float) -> int:
    """Number of columns left once the most expensive share is excluded.

    Args:
        size: Columns in the block.
        exclude_top: Share of the columns, those with the largest pivots, that are never kept.

    Returns:
        A number in [0, size].
    """
    return size - math.ceil(size * exclude_top - 1e-9)


def select_columns(
    pivots: Float[Tensor, " i"], energy: Float[Tensor, " i"], limit: float, exclude_top: float
) -> Bool[Tensor, " i"]:
    """Columns that the greedy choice keeps whole.

    Args:
        pivots: [block] `1 / U_mm^2`.
        energy: [block] sum over rows of the squared delta.
        limit: Budget on the summed cost; may be infinite.
        exclude_top: Share of columns with the largest pivots that are never kept.

    Returns:
        [block], True where the column is kept.
    """
    order = torch.argsort(pivots, stable=True)
    chosen = _within(energy[order] * pivots[order], limit)
    chosen[keepable(len(pivots), exclude_top) :] = False
    return torch.zeros_like(chosen).index_fill_(0, order[chosen], True)


def _within(costs: Float[Tensor, " n"], limit: float) -> Bool[Tensor, " n"]:
    # In float64 on the CPU: exact at the edge of the budget, and deterministic, which a CUDA cumsum is not.
    return (costs.cpu().double().cumsum(0) <= limit).to(costs.device)


def select_blockwise(
    curvature: Curvature,
    energy_of: Callable[[Transform], Tensor],
    *,
    rows: int,
    strength: float,
    exclude_top: float,
    block: int,
) -> Bool[Tensor, " i"]:
    """The published selection over all column blocks of a layer.

    Each block has its own budget. In later blocks the cost is that of the weight which the sweep over the earlier
    ones has already compensated, so the energy asked for is that of the residual.

    Args:
        curvature: Damped curvature of the layer.
        energy_of: Column energies [block] of a transformed delta; the only view of the delta that is needed.
        rows: Output features of the whole layer.
        strength: `s`; may be infinite.
        exclude_top: Share of each block's columns, the most expensive, that are never kept.
        block: Columns per block.

    Returns:
        [in], the kept columns.
    """
    pivots = curvature.pivots
    size = len(pivots)
    kept = torch.zeros(size, dtype=torch.bool, device=pivots.device)
    ratios = SweepRatios(curvature)
    for start in range(0, size, block):
        stop = min(start + block, size)
        residual = SweepResidual(ratios=ratios, kept=kept.clone(), start=start, stop=stop)
        limit = budget(pivots[start:stop], strength, rows)
        kept[start:stop] = select_columns(pivots[start:stop], energy_of(residual), limit, exclude_top)
    return kept
