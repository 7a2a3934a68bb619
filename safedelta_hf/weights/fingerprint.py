"""Digests that tell whether two weights are the same, bit for bit."""

import hashlib

import torch
from torch import Tensor, nn

from safedelta_hf.names import parameter_names
from safedelta_hf.quantised import stored_tensors


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes of a tensor; of a quantised one, of its packed data.

    Args:
        tensor: Any dense tensor, on any device.

    Returns:
        A hexadecimal digest.
    """
    result = hashlib.sha256()
    for stored in stored_tensors(tensor):
        plain = stored.detach().cpu().contiguous()
        result.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        result.update(plain.flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Digest of every parameter.

    Args:
        model: Any module.

    Returns:
        Digests by canonical name.
    """
    return {name: digest(parameter) for parameter, name in parameter_names(model).items()}


def data_types(model: nn.Module) -> dict[str, str]:
    """Data type of every parameter.

    Args:
        model: Any module.

    Returns:
        Names such as "bfloat16", by canonical parameter name.
    """
    return {name: str(parameter.dtype).removeprefix("torch.") for parameter, name in parameter_names(model).items()}
