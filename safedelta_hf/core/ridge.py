"""Ridge: shrink each direction of input space by how much more the safety data uses it than the task does.

Minimises `tr((D* - D) N (D* - D)^T) + lam tr(D* H D*^T)`, so that `D* = D N (N + lam H)^-1`, with `N` the identity
(ridge) or the second moment of the task's inputs (task ridge).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.curvature import cholesky
from safedelta_hf.core.transform import Dense, Transform


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


def utility_of(task: Tensor, blend: float) -> Tensor:
    """The task's moment with a share of the plain norm mixed in, `G + blend * mean(diag G) * I`.

    Args:
        task: `G` [in, in], or its diagonal [in].
        blend: Share of the mean diagonal; it makes what the task never uses worth keeping where safety does not mind.

    Returns:
        `N`, a new tensor of the same shape.
    """
    if task.ndim == 1:
        return task + blend * task.mean()
    utility = task.clone()
    utility.diagonal().add_(blend * task.diagonal().mean())
    return utility


def shrinkage(hessian: Tensor, utility: Tensor | None, strength: float) -> Dense | Shrinkage:
    """The transform that minimises the ridge objective.

    Args:
        hessian: `H` [in, in], or its diagonal [in]; positive semi-definite, float32.
        utility: `N` of the same shape, positive definite; None for the identity.
        strength: `lam`, at least 0 and finite; 0 keeps the delta as it is.

    Returns:
        The transform.
    """
    if strength == 0:
        return Dense(matrix=torch.ones(len(hessian), device=hessian.device))
    if hessian.ndim == 1:
        worth = torch.ones_like(hessian) if utility is None else utility
        return Dense(matrix=worth / (worth + strength * hessian))
    system = strength * hessian
    if utility is None:
        system.diagonal().add_(1.0)
    else:
        system.add_(utility)
    factor, retried = cholesky(system)
    return Shrinkage(
        utility=utility, factor=factor, notes=("factorised in float64 after float32 failed",) if retried else ()
    )
