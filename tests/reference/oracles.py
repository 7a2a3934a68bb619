"""Slow, obvious float64 versions of what the package computes."""

import torch
from torch import Tensor


def damped(hessian: Tensor, damping: float) -> Tensor:
    result = hessian.double().clone()
    for m in range(len(result)):
        if result[m, m] == 0:
            result[m, m] = 1.0
    return result + damping * result.diagonal().mean() * torch.eye(len(result), dtype=torch.float64)


def upper_factor_of_inverse(hessian: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True)


def published_sweep(delta: Tensor, kept: Tensor, hessian: Tensor, group: int = 4) -> Tensor:
    """Column by column: the error of each goes into all later groups; kept entries stay as tuned."""
    delta = delta.double()
    upper = upper_factor_of_inverse(hessian)
    size = delta.shape[1]
    state = torch.zeros_like(delta)
    for first in range(0, size, group):
        for m in range(first, min(first + group, size)):
            error = torch.where(kept[:, m], delta[:, m] - state[:, m], 0.0) / upper[m, m]
            for n in range(first + group, size):
                state[:, n] += error * upper[m, n]
    return torch.where(kept, delta, state)


def best_compensation(delta: Tensor, kept: Tensor, hessian: Tensor) -> Tensor:
    """Least quadratic loss given the kept columns, as a least-squares problem in the square root of H."""
    delta, hessian = delta.double(), hessian.double()
    root = torch.linalg.cholesky(hessian)
    fixed = delta[:, kept] @ root[kept]
    free = torch.linalg.lstsq(root[~kept].T, -fixed.T).solution.T
    result = torch.zeros_like(delta)
    result[:, kept], result[:, ~kept] = delta[:, kept], free
    return result


def greedy_entries(delta: Tensor, pivots: Tensor, limit: float) -> list[tuple[int, int]]:
    """Entry by entry in decreasing order of gain per cost, until the budget is exceeded."""
    entries = [(float(pivots[m]), m, o) for m in range(delta.shape[1]) for o in range(delta.shape[0])]
    entries.sort()
    spent, chosen = 0.0, []
    for pivot, m, o in entries:
        spent += float(delta[o, m].double() ** 2) * pivot
        if spent > limit:
            break
        chosen.append((o, m))
    return chosen


def loss(delta: Tensor, hessian: Tensor) -> float:
    delta, hessian = delta.double(), hessian.double()
    return 0.5 * float(torch.trace(delta @ hessian @ delta.T))


def ridge(delta: Tensor, utility: Tensor, hessian: Tensor, strength: float) -> Tensor:
    """`D N (N + lam H)^-1` with an explicit inverse."""
    delta, utility, hessian = delta.double(), utility.double(), hessian.double()
    return delta @ utility @ torch.linalg.inv(utility + strength * hessian)
