"""Whether a tensor holds NaN or Inf."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or Inf, without a copy of the tensor's size where none is.

    Args:
        tensor: Floating point, any shape.

    Returns:
        Whether all are finite.
    """
    # A sum has met every NaN and Inf. It may also overflow by itself, and then the entries have to be looked at.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(torch.isfinite(tensor).all())
