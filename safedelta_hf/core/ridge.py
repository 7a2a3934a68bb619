"""Ridge: shrink each direction of input space by how much more the safety data uses it than the task does.

Minimises `tr((D* - D) N (D* - D)^T) + lam tr(D* H D*^T)`, so that `D* = D N (N + lam H)^-1`, with `N` the identity
(ridge) or the second moment of the task's inputs (task ridge).
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.finite import is_finite
from safedelta_hf.core.low_rank import LowRank, LowRankShrinkage, Matrix, dense, gram, solves_sooner, tensors_of
from safedelta_hf.core.transform import Dense, Transform
from safedelta_hf.errors import FactorisationError, NumericalError

LEAST_PIVOT: Final = 1000 * torch.finfo(torch.float32).eps
"""Share of a diagonal entry of a system that a pivot of its float32 factor has to be: then its error is below 1 %."""

CLEAR_PIVOT: Final = 0.01
"""The same from which its error is below 1e-5, so that what is lost tells the quadratic loss of what is kept."""

BLOCK: Final = 64
"""Columns of a factor with pivoting that are computed before the rest of the matrix is brought up to date."""


@dataclass(frozen=True, kw_only=True)
class Shrinkage(Transform):
    """`D N (N + lam H)^-1` by triangular solves; the inverse is never formed.

    Attributes:
        utility: `N` [in, in], or None for the identity.
        factor: Lower Cholesky factor of `N + lam H`, [in, in].
    """

    utility: Tensor | None
    factor: Tensor

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        useful = rows if self.utility is None else rows @ self.utility.to(rows.dtype)
        return torch.cholesky_solve(useful.T, self.factor.to(rows.dtype)).T


def utility_of(task: Matrix, blend: float) -> Matrix:
    """The task's moment with a share of the plain norm mixed in, `G + blend * mean(diag G) * I`.

    Args:
        task: `G` [in, in], be it of low rank, or its diagonal [in].
        blend: Share of the mean diagonal; it makes what the task never uses worth keeping where safety does not mind.

    Returns:
        `N`, a new tensor of the same shape.
    """
    if isinstance(task, LowRank):
        return task.raised(blend * task.diagonal().mean())
    if task.ndim == 1:
        return task + blend * task.mean()
    utility = task.clone()
    utility.diagonal().add_(blend * task.diagonal().mean())
    return utility


def shrinkage(hessian: Matrix, utility: Matrix | None, strength: float) -> Dense | Shrinkage | LowRankShrinkage:
    """The transform that minimises the ridge objective.

    In float32, as long as that is accurate: a Cholesky factor of `S = N + lam H` is computed with an error of some
    roundings of `S_ii` in each pivot, so every pivot has to be `LEAST_PIVOT` of its `S_ii` or more. Where the safety
    data has fewer directions than there are inputs, and `lam H` is large, it is not; then in float64, with what of `H`
    is more than rounding.

    Args:
        hessian: `H` [in, in], be it of low rank, or its diagonal [in]; positive semi-definite but for rounding,
            float32.
        utility: `N` of the same shape, positive definite; None for the identity.
        strength: `lam`, at least 0 and finite; 0 keeps the delta as it is.

    Returns:
        The transform.

    Raises:
        NumericalError: A moment holds NaN or Inf.
    """
    if strength == 0:
        return Dense(matrix=torch.ones(len(hessian), device=hessian.device))
    if not all(is_finite(tensor) for one in (hessian, utility) if one is not None for tensor in tensors_of(one)):
        raise NumericalError("the moments of this layer hold NaN or Inf; check the model's activations")
    if isinstance(hessian, LowRank) and not isinstance(utility, Tensor) and hessian.device.type != "mps":
        rank = hessian.rank + (0 if utility is None else utility.rank)
        found = low_rank_shrinkage(hessian, utility, strength) if solves_sooner(rank, len(hessian)) else None
        if found is not None:
            return found
    hessian, utility = dense(hessian), None if utility is None else dense(utility)
    price = min(strength, torch.finfo(hessian.dtype).max)  # Inf times what safety never used would be NaN
    if hessian.ndim == 1:
        worth = torch.ones_like(hessian) if utility is None else utility
        return Dense(matrix=worth / (worth + price * hessian))
    system = price * hessian
    if utility is None:
        system.diagonal().add_(1.0)
    else:
        system.add_(utility)
    factor, info = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal().square() / system.diagonal()
    if not info.item() and pivots.min() >= LEAST_PIVOT:
        is_clear = utility is None and hessian.device.type != "mps" and bool(pivots.min() >= CLEAR_PIVOT)
        return Shrinkage(utility=utility, factor=factor, price=price if is_clear else None)
    del system, factor
    return _semidefinite_shrinkage(hessian, utility, strength)


def low_rank_shrinkage(hessian: LowRank, utility: LowRank | None, strength: float) -> LowRankShrinkage | None:
    """The same of low rank: `N + lam H` is a diagonal and the rows of both factors, formed without cancellation.

    Args:
        hessian: `H`.
        utility: `N`, with a positive diagonal beside its factor; None for the identity.
        strength: `lam`.

    Returns:
        The transform; None if its small system cannot be factored, also in float64.
    """
    price = min(strength, torch.finfo(torch.float32).max)
    wide, diagonal = hessian.factor * price**0.5, torch.ones_like(hessian.factor[0])
    if utility is not None:
        assert utility.rest is not None, "a share of the plain norm is in it"
        wide, diagonal = torch.cat([wide, utility.factor]), utility.rest.clone()
    if hessian.rest is not None:
        diagonal += price * hessian.rest
    for dtype in (torch.float32, torch.float64):
        system = gram(wide, 1 / diagonal, dtype)
        size = system.diagonal().clone()
        factor, info = torch.linalg.cholesky_ex(system)
        least = 0.0 if dtype == torch.float64 else LEAST_PIVOT
        if not info.item() and (factor.diagonal().square() >= least * size).all():
            notes = () if dtype == torch.float32 else ("solved in float64",)
            return LowRankShrinkage(utility=utility, diagonal=diagonal, wide=wide, inner=factor, notes=notes)
    return None


def _semidefinite_shrinkage(hessian: Tensor, utility: Tensor | None, strength: float) -> Dense:
    # With `H = L L^T` the inverse of `N + lam H` never meets `H` itself, whose rounding times lam can be larger than
    # `N` (Woodbury): T = I - L (L^T N^-1 L + I / lam)^-1 L^T N^-1.
    root = semidefinite_root(hessian)
    weighed = root
    if utility is not None:
        factor, info = torch.linalg.cholesky_ex(utility.to(root))
        if info.item():
            raise FactorisationError(
                f"the task's moment of {len(utility)} inputs, with the share of the plain norm in it, is not positive "
                "definite, also in float64; raise blend (0.1 by default)"
            )
        weighed = torch.cholesky_solve(root, factor)
    inner = root.T @ weighed
    inner.diagonal().add_(1 / strength)
    factor, info = torch.linalg.cholesky_ex(inner)
    if info.item():
        raise FactorisationError(
            f"strength={strength:g} is too large for a layer of {len(hessian)} inputs: its system cannot be solved, "
            "also in float64; choose a smaller one"
        )
    matrix = (root @ torch.cholesky_solve(weighed.T, factor)).neg_()
    matrix.diagonal().add_(1.0)
    note = (
        f"solved in float64; float32 tells {root.shape[1]} of {len(root)} directions of the safety data from rounding"
    )
    return Dense(matrix=matrix.to(hessian.device, hessian.dtype), notes=(note,))


def semidefinite_root(hessian: Float[Tensor, "i i"]) -> Float[Tensor, "i r"]:
    """What a moment that was rounded to float32 says for sure: `L` of `H = L L^T`, by Cholesky with pivoting.

    The rounding of the entries can make a matrix of fewer directions than inputs indefinite. It moves what the other
    inputs leave unexplained of one input by about `sqrt(in)` roundings of its own moment; what is below that counts as
    no direction of its own (Higham, Accuracy and Stability of Numerical Algorithms, section 10.3). Each input is
    compared with itself alone, so massive activations hide nothing of the others.

    Args:
        hessian: `H` [in, in], symmetric, float32.

    Returns:
        `L` [in, directions], float64, on the device of `H` if that has float64.
    """
    exact = hessian.to("cpu" if hessian.device.type == "mps" else hessian.device, torch.float64)
    size = exact.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0.0)
    rest = exact * inverse * inverse[:, None]
    unexplained = rest.diagonal().clone()
    floor = len(rest) ** 0.5 * torch.finfo(torch.float32).eps
    root, done = torch.zeros_like(rest), 0
    while done < len(rest) and unexplained.max() > floor:
        first = done
        while done < min(first + BLOCK, len(rest)):
            pivot = unexplained.argmax()
            if unexplained[pivot] <= floor:
                break
            column = rest[:, pivot] - root[:, first:done] @ root[pivot, first:done]
            root[:, done] = column / unexplained[pivot].sqrt()
            unexplained -= root[:, done].square()
            unexplained[pivot] = 0.0
            done += 1
        rest.addmm_(root[:, first:done], root[:, first:done].T, alpha=-1)
    return size[:, None] * root[:, :done]
