"""Damped curvature of the safety loss and its factor."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from safedelta_hf.core.finite import is_finite
from safedelta_hf.core.low_rank import LowRank, Matrix
from safedelta_hf.core.transform import Dense, SymmetricForm, Transform
from safedelta_hf.errors import FactorisationError, NumericalError

LEAST_SHARE_LOST: Final = 1 / 32
"""What `<D - D*, D*>` has to be of `|D*|^2` for its rounding, of about their sum, to be below 1e-5 of it."""

LEAST_PRODUCT: Final = 1e-25
"""Below it, products of float32 may have vanished from a sum."""

LEAST_REMAINDER: Final = 1e-6
"""Share of a loss that may be left out of it."""


class Lost(NamedTuple):
    """What of a delta `D` is lost where `D*` is kept and the weights carry `X` of it, as sums over all entries.

    Attributes:
        kept: `|D*|^2`.
        product: `<D - D*, 2 X - D*>`, which is `<D - D*, D*>` where the weights carry all that is kept.
        rounded: `|X - D*|^2`.
    """

    kept: float
    product: float
    rounded: float


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Damped Hessian of one layer with its upper factor, `H = R R^T`.

    Attributes:
        hessian: `H` [in, in], damped.
        factor: `R` [in, in], upper triangular with a positive diagonal.
        retried: Whether the factorisation needed float64.
    """

    hessian: Tensor
    factor: Tensor
    retried: bool

    @property
    def pivots(self) -> Tensor:
        """`1 / U_mm^2` [in]: the safety cost of one unit of energy kept in column m (OBS in sweep order)."""
        return self.factor.diagonal().square()

    @property
    def notes(self) -> tuple[str, ...]:
        """Numerical trouble met on the way, for the report."""
        return ("factorised in float64 after float32 failed",) if self.retried else ()


def damp(hessian: Float[Tensor, "i i"], damping: float) -> Float[Tensor, "i i"]:
    """Make a Hessian positive definite as the published code does.

    Inputs that were always zero get a unit diagonal; then `damping` times the mean diagonal is added.

    Args:
        hessian: [in, in], symmetric.
        damping: Share of the mean diagonal.

    Returns:
        A new [in, in] tensor.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    return damped


def cholesky(matrix: Float[Tensor, "i i"]) -> tuple[Float[Tensor, "i i"], bool]:
    """Lower Cholesky factor, with one retry in float64.

    Args:
        matrix: [in, in], symmetric positive definite.

    Returns:
        The factor in the dtype of the matrix, and whether float64 was needed.

    Raises:
        NumericalError: The matrix holds NaN or Inf.
        FactorisationError: It is not positive definite, also in float64.
    """
    if not is_finite(matrix):
        raise NumericalError("the Hessian of the safety loss holds NaN or Inf; check the model's activations")
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.item():
        return factor, False
    warnings.warn("Cholesky factorisation failed in float32; retrying in float64", stacklevel=2)
    factor, info = torch.linalg.cholesky_ex(matrix.to("cpu", torch.float64))
    if info.item():
        raise FactorisationError(
            f"the damped Hessian of {len(matrix)} inputs is not positive definite, also in float64 (leading minor "
            f"{info.item()}); raise the damping (0.01 by default) or use more safety data"
        )
    return factor.to(matrix.device, matrix.dtype), True


def factorise(hessian: Float[Tensor, "i i"], damping: float) -> Curvature:
    """Damp a Hessian and factor it as `R R^T` with `R` upper triangular.

    One Cholesky of the reversed matrix gives `R`; since `R^-1` is the upper Cholesky factor `U` of the inverse,
    no inverse is ever formed.

    Args:
        hessian: [in, in], symmetric positive semi-definite, not yet damped.
        damping: Share of the mean diagonal to add.

    Returns:
        The damped curvature.
    """
    damped = damp(hessian, damping)
    lower, retried = cholesky(damped.flip(0, 1))
    return Curvature(hessian=damped, factor=lower.flip(0, 1), retried=retried)


def quadratic_loss(inner: Callable[[Transform], float], hessian: Matrix) -> float:
    """`q(D) = 1/2 tr(D H D^T)`, the rise of the output-reconstruction loss that a delta causes.

    Args:
        inner: Inner product of the delta with its transform, summed over all rows wherever they are.
        hessian: `H` [in, in], be it of low rank, or its diagonal [in].

    Returns:
        The loss, at least zero for a positive semi-definite `H`.
    """
    if isinstance(hessian, LowRank):
        return 0.5 * inner(hessian)
    return 0.5 * inner(Dense(matrix=hessian) if hessian.ndim == 1 else SymmetricForm(matrix=hessian))


def loss_by_price(lost: Lost, price: float, hessian: Tensor) -> float | None:
    """The quadratic loss of a ridge's result, without a product.

    With `D = D* (I + lam H)`, what is lost is `lam D* H`. So `q(X) = <D - D*, 2 X - D*> / 2 lam + q(X - D*)`, where the
    last is at most `|X - D*|^2 tr(H) / 2`.

    Args:
        lost: What is lost where `D*` is kept.
        price: `lam`.
        hessian: `H` [in, in].

    Returns:
        `q(X)`; None where rounding, or `q(X - D*)`, has a say in it.
    """
    if not max(LEAST_PRODUCT, LEAST_SHARE_LOST * lost.kept) <= lost.product < math.inf:
        return None
    loss = 0.5 * lost.product / price
    left_out = 0.5 * lost.rounded * float(hessian.diagonal().sum(dtype=torch.float64))
    return loss if left_out <= LEAST_REMAINDER * loss else None
