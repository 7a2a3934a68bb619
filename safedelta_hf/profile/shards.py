"""Which moments stand together in one file, and what is in it."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.folders import complete_file
from safedelta_hf.profile.encodings import Encoding, encoding_for
from safedelta_hf.profile.header import StoredMoment
from safedelta_hf.profile.moments import Moments

SHARD_BYTES: Final = 8 * 2**20
"""Small moments share a file of up to this size; a larger one has its own. A file is read whole to check its digest."""
_STRIP: Final = 512
_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16"}
_UNDERFLOW: Final = 1e-12
_ROUNDING: Final = 0.02
"""How far entries may be from what a positive semi-definite symmetric matrix allows, as bfloat16 leaves them."""


def shards_of(moments: Moments, storage: Encoding) -> dict[str, list[str]]:
    """Divide moments into files, by their shapes alone.

    Args:
        moments: All of them.
        storage: How to store them.

    Returns:
        Keys by name of the file, in the order of the moments.
    """
    groups: list[list[str]] = []
    left = 0
    for key in moments:
        shape = moments.shape(key)
        size = encoding_for(shape, storage).bytes(shape)
        if size > left:
            groups.append([])
            left = SHARD_BYTES
        groups[-1].append(key)
        left -= size
    return {f"moments-{number:05d}-of-{len(groups):05d}.safetensors": keys for number, keys in enumerate(groups, 1)}


def write_shard(path: Path, totals: Mapping[str, Tensor], storage: Encoding) -> None:
    """Write a file of moments; complete or not there at all.

    Args:
        path: The file.
        totals: Moments by key.
        storage: How to store them.
    """
    stored = {}
    for key, total in totals.items():
        parts = encoding_for(tuple(total.shape), storage).encode(total)
        stored.update({f"{key}/{part}": tensor.contiguous() for part, tensor in parts.items()})
    with complete_file(path) as part_file:
        save_file(stored, part_file)


def read_moment(path: Path, entry: StoredMoment, beside: Iterable[StoredMoment]) -> InputMoment:
    """Read one moment of a file.

    Args:
        path: The file.
        entry: The moment.
        beside: All moments that the file should hold, this one included.

    Returns:
        The moment.

    Raises:
        ValueError: The file holds something else, or a moment that cannot be one.
    """
    expected = {f"{other.key}/{part}" for other in beside for part in other.encoding.layouts(other.shape)}
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != expected:
                raise ValueError(f"it holds other tensors, such as {sorted(set(file.keys()) ^ expected)[0][:100]!r}")
            stored = {}
            for part, layout in entry.encoding.layouts(entry.shape).items():
                name = f"{entry.key}/{part}"
                view = file.get_slice(name)
                if (view.get_dtype(), tuple(view.get_shape())) != (_NAMES[layout.dtype], layout.shape):
                    raise ValueError(f"{name!r} is {view.get_dtype()} {view.get_shape()}, not {layout}")
                stored[part] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    total = entry.encoding.decode(stored)
    require_moment(total, entry.key)
    return InputMoment(total=total, sequences=entry.sequences, tokens=entry.tokens)


def require_moment(total: Tensor, key: str) -> None:
    """Make sure that values can be a sum of products: finite, symmetric, and none larger than the diagonal allows.

    Args:
        total: [in, in] or [in].
        key: What to call it.

    Raises:
        ValueError: They cannot.
    """
    diagonal = total if total.dim() == 1 else total.diagonal()
    if not torch.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ValueError(f"moment {key!r} holds NaN, Inf or a negative square")
    if total.dim() == 1:
        return
    # The squares of tiny inputs are zero in float32, while their products with others are not.
    root = (diagonal + _UNDERFLOW * diagonal.mean()).sqrt()
    for start in range(0, len(total), _STRIP):
        rows = total[start : start + _STRIP]
        allowed = root[start : start + _STRIP, None] * root
        # NaN is not less than anything.
        bounded = (rows.abs() <= allowed * (1 + _ROUNDING)).all()
        if not bounded or not ((rows - total[:, start : start + _STRIP].T).abs() <= allowed * _ROUNDING).all():
            raise ValueError(f"moment {key!r} is no symmetric positive semi-definite matrix")


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        A hexadecimal digest.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_values(total: Tensor) -> str:
    """SHA-256 of a tensor's float32 values.

    Args:
        total: Any shape.

    Returns:
        A hexadecimal digest.
    """
    return hashlib.sha256(total.contiguous().view(torch.uint8).numpy().data).hexdigest()
