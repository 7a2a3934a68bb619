"""How the columns that are not kept make up, in safety, for those that are.

S are the kept and R the other columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.curvature import Curvature, cholesky
from safedelta_hf.core.transform import KeepColumns, Transform

SWEEP_GROUP = 4
"""Columns that the published sweep treats at once, without compensating one another."""


def joint_compensation(curvature: Curvature, kept: Bool[Tensor, " i"]) -> KeepColumns:
    """Keep columns with the response of the least quadratic loss, `M = -H_SR H_RR^-1` (equal to `K_SS^-1 K_SR`).

    Args:
        curvature: Damped curvature of the layer.
        kept: [in], the columns of S.

    Returns:
        The transform, with notes of the curvature and of its own if float64 was needed.
    """
    others = ~kept
    cross_rs = curvature.hessian[others][:, kept]
    factor, retried = cholesky(curvature.hessian[others][:, others])
    notes = ("compensation solved in float64 after float32 failed",) if retried else ()
    return KeepColumns(kept=kept, response=-torch.cholesky_solve(cross_rs, factor).T, notes=(*curvature.notes, *notes))


def sweep_ratios(curvature: Curvature, kept: Int[Tensor, " s"]) -> Float[Tensor, "s i"]:
    """Rows `U_mn / U_mm` that the published sweep subtracts, for kept columns m and every later column n.

    Entries on the diagonal, left of it, and within a group of `SWEEP_GROUP` columns are zero.

    Args:
        curvature: Damped curvature of the layer.
        kept: [kept], indices m in increasing order.

    Returns:
        [kept, in].
    """
    size = len(curvature.factor)
    units = torch.zeros(len(kept), size, dtype=curvature.factor.dtype, device=kept.device)
    units[torch.arange(len(kept), device=kept.device), kept] = curvature.factor.diagonal()[kept]
    ratios: Tensor = torch.linalg.solve_triangular(curvature.factor, units, upper=True, left=False)
    columns = torch.arange(size, device=kept.device)
    ratios.masked_fill_(columns // SWEEP_GROUP <= kept[:, None] // SWEEP_GROUP, 0.0)
    return ratios


def sweep_response(
    ratios: Float[Tensor, "s i"], kept: Int[Tensor, " s"], columns: Int[Tensor, " b"]
) -> Float[Tensor, "s b"]:
    """What one rightward sweep over the kept columns adds to the given columns.

    The sweep leaves the residual `r_n = D_n - sum_m r_m V_mn` in each kept column n, a unit triangular system in
    `r`; the other columns receive `sum_m r_m V_mn`. So `M = (1 + V_SS)^-1 V_SB`, for all rows at once.

    Args:
        ratios: `V` [kept, in], from `sweep_ratios`.
        kept: [kept], indices of S in increasing order.
        columns: [block], the columns that are asked for.

    Returns:
        `M` [kept, block].
    """
    response: Tensor = torch.linalg.solve_triangular(
        ratios[:, kept], ratios[:, columns], upper=True, unitriangular=True
    )
    return response


def sequential_compensation(curvature: Curvature, kept: Bool[Tensor, " i"]) -> KeepColumns:
    """Keep columns with the response of the published sweep: kept columns compensate in later columns only.

    Args:
        curvature: Damped curvature of the layer.
        kept: [in], the columns of S.

    Returns:
        The transform, with notes of the curvature.
    """
    indices = kept.nonzero().squeeze(1)
    ratios = sweep_ratios(curvature, indices)
    response = sweep_response(ratios, indices, (~kept).nonzero().squeeze(1))
    return KeepColumns(kept=kept, response=response, notes=curvature.notes)


CHUNK = 64 * SWEEP_GROUP
"""Columns that are swept between two large products; a matter of speed alone."""


class SweepRatios:
    """Rows `U_mn / U_mm` of the columns that are kept, made when they are first asked for.

    Args:
        curvature: Damped curvature of the layer.
    """

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature
        self._rows = curvature.factor.new_zeros(0, len(curvature.factor))

    def of(self, kept: Int[Tensor, " s"]) -> Float[Tensor, "s i"]:
        """The rows of some columns.

        Args:
            kept: [kept], in increasing order; those asked for before stand first.

        Returns:
            [kept, in].
        """
        new = kept[len(self._rows) :]
        if len(new):
            self._rows = torch.cat([self._rows, sweep_ratios(self.curvature, new)])
        return self._rows


@dataclass(frozen=True, kw_only=True)
class SweepResidual(Transform):
    """What kept columns leave undone in a block of later columns, `D_B - D_S M_B`.

    Attributes:
        ratios: Of the layer.
        kept: [in] bool, the columns of S, all left of the block.
        start: First column of the block; a multiple of `SWEEP_GROUP`.
        stop: Column after the block.
    """

    ratios: SweepRatios
    kept: Tensor
    start: int
    stop: int

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o b"]:
        block = rows[:, self.start : self.stop]
        kept = self.kept.nonzero().squeeze(1)
        # The response costs as much as `in * kept` rows, and serves them all.
        if len(rows) < len(kept):
            return block - swept(self.ratios.curvature.factor.to(rows), rows, self.kept, self.start, self.stop)
        columns = torch.arange(self.start, self.stop, device=kept.device)
        response = sweep_response(self.ratios.of(kept), kept, columns)
        return block - rows[:, kept] @ response.to(rows.dtype)


def swept(
    factor: Float[Tensor, "i i"], rows: Float[Tensor, "o i"], kept: Bool[Tensor, " i"], start: int, stop: int
) -> Float[Tensor, "o b"]:
    """What a block of columns receives from the sweep over kept columns left of it, without forming `U`.

    With `x_m = r_m / U_mm` for the residual `r_m` of each kept column, and zero for the others, what is received is
    `y = x U`. As `U = R^-1`, `y R = x`: forward substitution with `R` alone gives `y` from left to right.

    Args:
        factor: `R` [in, in], upper triangular.
        rows: [rows, in].
        kept: [in], the columns of S.
        start: First column of the block; a multiple of `SWEEP_GROUP`.
        stop: Column after the block.

    Returns:
        [rows, block].
    """
    received = rows.new_zeros(len(rows), start)
    for left in range(0, start, CHUNK):
        right = min(left + CHUNK, start)
        carried = received[:, :left] @ factor[:left, left:right]
        for first in range(left, right, SWEEP_GROUP):
            group = slice(first, first + SWEEP_GROUP)
            inner = slice(first - left, first - left + SWEEP_GROUP)
            carry = carried[:, inner] + received[:, left:first] @ factor[left:first, group]
            corner = factor[group, group]
            before = _over(-carry, corner)
            source = (rows[:, group] - before) * corner.diagonal() * kept[group]
            received[:, group] = _over(source - carry, corner)
    return _over(-(received @ factor[:start, start:stop]), factor[start:stop, start:stop])


def _over(rows: Tensor, triangle: Tensor) -> Tensor:
    quotient: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=True, left=False)
    return quotient
