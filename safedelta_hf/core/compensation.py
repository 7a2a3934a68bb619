"""How the columns that are not kept make up, in safety, for those that are.

S are the kept and R the other columns.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safedelta_hf.core.curvature import Curvature, cholesky

SWEEP_GROUP = 4
"""Columns that the published sweep treats at once, without compensating one another."""


class Response(NamedTuple):
    """How the other columns answer to the kept ones, `D*_R = D_S M`.

    Attributes:
        matrix: `M` [kept, others].
        notes: Numerical trouble met on the way.
    """

    matrix: Tensor
    notes: tuple[str, ...] = ()


def joint_response(curvature: Curvature, kept: Bool[Tensor, " i"]) -> Response:
    """The response with the least quadratic loss, `-H_SR H_RR^-1` (equal to `K_SS^-1 K_SR`).

    Args:
        curvature: Damped curvature of the layer.
        kept: [in], the columns of S.

    Returns:
        `M`, and a note if float64 was needed.
    """
    others = ~kept
    cross_rs = curvature.hessian[others][:, kept]
    factor, retried = cholesky(curvature.hessian[others][:, others])
    notes = ("compensation solved in float64 after float32 failed",) if retried else ()
    return Response(-torch.cholesky_solve(cross_rs, factor).T, notes)


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


def sequential_response(curvature: Curvature, kept: Bool[Tensor, " i"]) -> Response:
    """The response of the published sweep: kept columns compensate in later columns only.

    Args:
        curvature: Damped curvature of the layer.
        kept: [in], the columns of S.

    Returns:
        `M`.
    """
    indices = kept.nonzero().squeeze(1)
    ratios = sweep_ratios(curvature, indices)
    return Response(sweep_response(ratios, indices, (~kept).nonzero().squeeze(1)))
