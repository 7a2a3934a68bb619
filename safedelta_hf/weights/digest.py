"""Digests that tell weights and inputs from others, bit for bit, also where no process holds the whole of one."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.distributed.model import Shard, ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.modules.quantised import is_quantised, stored_tensors
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import Use
from safedelta_hf.weights.safetensors_files import SafetensorsFiles

LEAST_ROW = 1024
"""Bytes of the slices along the first dimension from which each has a digest of its own."""


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and the SHA-256 of each slice along the first dimension.

    Of a vector, or a tensor of small slices, the SHA-256 of all its bytes takes their place; of a quantised one, its
    packed data is looked at.

    Args:
        tensor: Any dense tensor, on any device.

    Returns:
        A hexadecimal digest.
    """
    result = hashlib.sha256()
    for stored in stored_tensors(tensor):
        result.update(_described(stored.dtype, stored.shape))
        result.update(_slice_digests(stored.detach(), stored.shape).numpy().data)
    return result.hexdigest()


def digest_of_shard(rows: Tensor, shape: torch.Size, shard: Shard, ranks: Ranks) -> str:
    """The digest of a whole weight of which this process holds a shard.

    Ranks exchange digests, and no weight but vectors and others of small slices.

    Args:
        rows: The shard, [slices, ...].
        shape: Shape of the whole.
        shard: Where the rows lie in it.
        ranks: The processes that hold the other shards call this too.

    Returns:
        What `digest` gives of the whole; something else if the rows are not of its shape.
    """
    if shard.group is None:
        return digest(rows)
    expected = (shard.stop - shard.start, *shape[1:])
    if tuple(rows.shape) != expected:
        rows = rows.new_zeros(expected)
    if not _has_own_digests(shape, rows.dtype):
        return digest(ranks.assembled(rows.detach(), shard.start, shard.size, shard.group))
    own = _slice_digests(rows.detach(), shape)
    result = hashlib.sha256(_described(rows.dtype, shape))
    result.update(ranks.assembled(own, shard.start, shard.size, shard.group).numpy().data)
    return result.hexdigest()


def digest_of_held(weight: Tensor, name: str, model: ShardedModel | None) -> str:
    """The digest of a whole weight of which a process may have read only what it holds of a model.

    Args:
        weight: The weight, or that shard of it.
        name: Canonical parameter name.
        model: The model, all of whose ranks call this; None if the weight is whole.

    Returns:
        What `digest` gives of the whole.
    """
    if model is None:
        return digest(weight)
    return digest_of_shard(weight, model.shape(name), model.shard(name), model.ranks)


def parameter_digest(model: ShardedModel, name: str, dtype: torch.dtype | None = None) -> str:
    """Digest of a parameter, whoever holds it.

    Args:
        model: The model; all its ranks call this.
        name: Canonical parameter name.
        dtype: Data type in which it is looked at; its own if None, or if it is packed.

    Returns:
        What `digest` gives of the whole.
    """
    parameter = model.live(name)
    if model.shard(name).is_whole and is_quantised(parameter):
        return digest(parameter)  # its codes, wherever its class keeps them
    rows = model.read(name)
    if dtype is not None and rows.is_floating_point():
        rows = rows.to(dtype)
    return digest_of_held(rows, name, model)


def fingerprint(model: ShardedModel) -> dict[str, str]:
    """Digest of every parameter.

    Args:
        model: The model; all its ranks call this.

    Returns:
        Digests by canonical name.
    """
    return {name: parameter_digest(model, name) for name in model.names}


def _described(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return f"{dtype}{tuple(shape)}".encode()


def _has_own_digests(shape: torch.Size, dtype: torch.dtype) -> bool:
    return len(shape) > 1 and math.prod(shape[1:]) * dtype.itemsize >= LEAST_ROW


def _slice_digests(rows: Tensor, shape: torch.Size) -> Tensor:
    """Digests of slices.

    Args:
        rows: Some slices of a weight, or all of it.
        shape: Shape of the weight, which decides whether slices have digests of their own.

    Returns:
        [slices, 32] bytes, or [1, 32].
    """
    plain = rows.cpu().contiguous().flatten().view(torch.uint8).numpy()
    count = rows.shape[0] if _has_own_digests(shape, rows.dtype) else 1
    if not count:
        return torch.zeros((0, 32), dtype=torch.uint8)
    found = b"".join(hashlib.sha256(part.data).digest() for part in plain.reshape(count, -1))
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(count, 32)


Identity = Any
"""Plain values, which JSON can hold."""


def files_identity(files: SafetensorsFiles) -> Identity:
    """What tells a checkpoint from others.

    Args:
        files: Its files.

    Returns:
        Name, size and time of last change of each.
    """
    index = () if files.index is None else (files.index,)
    return _times([*files.paths.values(), *index])


def folder_identity(folder: object) -> Identity:
    """What tells the files of a folder from others.

    Args:
        folder: The folder; anything else has none.

    Returns:
        Name, size and time of last change of each file; None for what is no folder.
    """
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        return None
    return _times(path for path in sorted(Path(folder).rglob("*")) if path.is_file())


def source_identity(source: object) -> Identity:
    """What tells a further model from others.

    Args:
        source: A model, its folder, or a reader of its weights.

    Returns:
        A digest of its weights if it is in memory, else what is known of its files.
    """
    if isinstance(source, nn.Module):
        return _digest(fingerprint(open_model(source)))
    return folder_identity(source)


def profile_identity(header: ProfileHeader, uses: Sequence[Use], moments: str) -> Identity:
    """What tells a profile from others, wherever it is.

    Args:
        header: Its header.
        uses: How each covered parameter is used.
        moments: What tells its moments from others.

    Returns:
        A digest.
    """
    return _digest([asdict(header), [asdict(use) for use in uses], moments])


def _digest(values: Identity) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _times(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    found = []
    for path in paths:
        status = path.stat()
        found.append((path.name, status.st_size, status.st_mtime_ns))
    return found
