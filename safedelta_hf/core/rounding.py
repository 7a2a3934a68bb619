"""Rounding a weight to a coarser data type so that it costs little safety.

Nearest rounding moves each entry by up to half a step, which may be more than the fine-tuning did: what a rule changes
by less is lost, and the safety loss comes back. So the error of each column is made up for in the columns that are
rounded after it, as in GPTQ (Frantar et al., arXiv 2210.17323), here in the form of LDLQ (Chee et al., QuIP, arXiv
2307.13304, section 3): with `H = R R^T`, `R` upper triangular, and `E` the errors of all columns,
`tr(E H E^T) = |E R|^2`, and column k of `E R` is `R_kk` times the error of rounding `W_k + sum_{j<k} E_j R_jk / R_kk`.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

CHUNK = 128
"""Columns that are rounded between two large products; a matter of speed alone."""


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether rounding to a data type may move a weight by as much as a fine-tuning does.

    Args:
        dtype: The type that weights are kept in.

    Returns:
        Whether it is coarser than float32.
    """
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def round_columns(weight: Float[Tensor, "o i"], dtype: torch.dtype, factor: Float[Tensor, "i i"]) -> Num[Tensor, "o i"]:
    """Round a weight column by column, the error of each fed into those that come after it.

    Args:
        weight: [out, in] float32.
        dtype: What to round to.
        factor: `R` [in, in], upper triangular with a positive diagonal, of the damped Hessian `H = R R^T`.

    Returns:
        [out, in], of that type. A weight that the type holds exactly is returned as it is.
    """
    feedback = factor / factor.diagonal()
    left = weight.T.contiguous()  # columns as they are wanted, and once rounded what is left of them
    rounded = torch.empty_like(left, dtype=dtype)
    for start in range(0, len(left), CHUNK):
        chunk = slice(start, start + CHUNK)
        wanted = left[chunk] + feedback[:start, chunk].T @ left[:start]
        for number, column in enumerate(wanted, start):
            rounded[number] = column
            left[number] -= rounded[number]
            later = slice(number + 1, start + CHUNK)
            wanted[number + 1 - start :].addr_(feedback[number, later], left[number])
    return rounded.T
