"""The quadratic safety loss of a delta."""

from collections.abc import Callable

from torch import Tensor

from safedelta_hf.core.transform import Dense, Transform


def quadratic_loss(inner: Callable[[Transform], float], hessian: Tensor) -> float:
    """`q(D) = 1/2 tr(D H D^T)`, the rise of the output-reconstruction loss that a delta causes.

    Args:
        inner: Inner product of the delta with its transform, summed over all rows wherever they are.
        hessian: `H` [in, in], or its diagonal [in].

    Returns:
        The loss, at least zero for a positive semi-definite `H`.
    """
    return 0.5 * inner(Dense(matrix=hessian))
