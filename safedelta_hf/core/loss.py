"""The quadratic safety loss of a delta."""

from jaxtyping import Float
from torch import Tensor


def quadratic_loss(delta: Float[Tensor, "o i"], hessian: Float[Tensor, "..."]) -> float:
    """`q(D) = 1/2 tr(D H D^T)`, the rise of the output-reconstruction loss that a delta causes.

    Args:
        delta: [out, in].
        hessian: `H` [in, in], or its diagonal [in].

    Returns:
        The loss, at least zero for a positive semi-definite `H`.
    """
    if hessian.ndim == 1:
        return 0.5 * float((delta.square() * hessian).sum())
    return 0.5 * float(((delta @ hessian) * delta).sum())
