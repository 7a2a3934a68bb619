"""The directions of input space that the safety data hardly uses, and the projector on them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.finite import is_finite
from safedelta_hf.core.low_rank import LowRank, Matrix, dense, tensors_of
from safedelta_hf.core.transform import Dense, Transform
from safedelta_hf.errors import NumericalError


@dataclass(frozen=True, kw_only=True)
class Removal(Transform):
    """`D (I - U U^T)`: what rows have in some directions is taken out of them.

    Attributes:
        directions: `U` [in, directions], orthonormal columns.
    """

    directions: Tensor

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        directions = self.directions.to(rows.dtype)
        return rows - (rows @ directions) @ directions.T


def null_space(hessian: Matrix, energy: float) -> Dense | Removal:
    """The projector on the near-null space of a Hessian (GuardSpace, arXiv 2510.14301).

    Kept are the eigenvectors of the smallest eigenvalues, as many as sum up to no more than that share of the trace.
    With `h` the largest eigenvalue among them, `q(D P) <= 1/2 h |D|^2`.

    Args:
        hessian: `H` [in, in], be it of low rank, or its diagonal [in]; positive semi-definite.
        energy: Share of the trace that may be left to the delta, in [0, 1]; 1 keeps the delta as it is.

    Returns:
        The transform `P`.

    Raises:
        NumericalError: The Hessian holds NaN or Inf.
    """
    hessian = hessian if isinstance(hessian, LowRank) and hessian.rest is None else dense(hessian)
    if not all(map(is_finite, tensors_of(hessian))):
        raise NumericalError("the Hessian of the safety loss holds NaN or Inf; check the model's activations")
    if isinstance(hessian, LowRank):
        return _null_space_of(hessian, energy)
    exact = hessian.double()
    if exact.ndim == 1:
        values, places = exact.sort()
        kept = torch.zeros_like(hessian)
        kept[places[: _count(values, energy)]] = 1.0
        return Dense(matrix=kept)
    values, vectors = torch.linalg.eigh(exact)  # ascending
    count = _count(values, energy)
    if count == len(values):
        return Dense(matrix=torch.ones_like(hessian[0]))
    return Removal(directions=vectors[:, count:].to(hessian.dtype).contiguous())


def _null_space_of(hessian: LowRank, energy: float) -> Dense | Removal:
    # Right singular vectors of the factor; all other directions are not used at all.
    _, sizes, directions = torch.linalg.svd(hessian.factor.double(), full_matrices=False)
    unused = sizes.new_zeros(len(hessian) - len(sizes))
    count = _count(torch.cat([unused, sizes.flip(0).square()]), energy) - len(unused)
    if energy == 1 or count == len(sizes):
        return Dense(matrix=torch.ones_like(hessian.factor[0]))
    return Removal(directions=directions[: len(sizes) - max(count, 0)].T.to(hessian.factor.dtype).contiguous())


def _count(values: Tensor, energy: float) -> int:
    if energy == 1:
        return len(values)
    # What rounding leaves of eigenvalues that are zero is no use of their directions.
    is_used = values > len(values) * torch.finfo(torch.float32).eps * values[-1]
    sums = torch.where(is_used, values, 0.0).cumsum(0)
    return int((sums <= energy * sums[-1]).sum())
