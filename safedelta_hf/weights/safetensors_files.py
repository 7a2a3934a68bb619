"""The safetensors files of a model, known from their headers; tensors are read one at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from safedelta_hf.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Data types in which weights are read as numbers, by the names that safetensors gives them."""

TYPES = FLOATING | {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Data types that can be read."""

LENGTH_BYTES = 8
"""Of the number that a safetensors file starts with: the length of its header."""

LARGEST_INDEX = 100_000_000
"""Bytes of an index that are read at most; as many as safetensors allows a header."""

_UNREADABLE = (OSError, SafetensorError, ValueError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: Name of the file in its folder.
        path: Where that is.
        dtype: Data type as safetensors names it, such as "BF16".
        shape: Its shape.
        start: Its first byte in the file.
        stop: The byte after its last.
    """

    file: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFiles:
    """Every tensor of a model that is saved as one safetensors file, or as shards with an index.

    Only headers are read; whatever is wrong with them is found here.

    Args:
        source: A folder, or a repository already in the local Hub cache.
        revision: Revision in the Hub cache.

    Raises:
        CheckpointError: There are no such files, or they contradict themselves or one another.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        self.source = str(source)
        self._revision = revision
        index, single = self._located(INDEX_FILE), self._located(SINGLE_FILE)
        self.index = index
        self.config = self._located(CONFIG_FILE)
        if index is not None:
            weight_map = _read_index(index)
            if single is not None and SINGLE_FILE not in weight_map.values():
                raise CheckpointError(
                    f"{self.source!r} holds both {SINGLE_FILE} and the shards of {INDEX_FILE}; remove what is stale"
                )
            self.paths = {file: self._shard(file) for file in sorted(set(weight_map.values()))}
            self.tensors = self._indexed(weight_map)
        elif single is not None:
            self.paths = {SINGLE_FILE: single}
            self.tensors = dict(read_header(SINGLE_FILE, single))
        else:
            raise CheckpointError(
                f"{self.source!r} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder of safetensors files or "
                "a repository in the local Hub cache"
            )
        empty = [name for name, found in self.tensors.items() if found.shape == (0,) and "F" in found.dtype]
        if len(empty) > 1:  # a single one is some buffer of the model's own
            raise CheckpointError(
                f"{empty[0]}: has the shape [0] in {self.source!r}, as have {len(empty) - 1} others: what DeepSpeed "
                "ZeRO-3 leaves in place of weights that it partitions; save them whole, by zero_to_fp32.py or "
                "stage3_gather_16bit_weights_on_model_save"
            )

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Read one tensor.

        The file is not mapped: a mapping that torch can use counts as memory in full, and a file may be larger.

        Args:
            name: As in the files.
            rows: The slices along the first dimension to read, from one to before another; None for all.

        Returns:
            A new tensor in host memory, in the dtype of the file.

        Raises:
            CheckpointError: The file cannot be read, or the tensor is of a type that is not read.
        """
        place = self.tensors[name]
        if place.dtype not in TYPES:
            raise CheckpointError(
                f"{name}: stored as {place.dtype} in {str(place.path)!r}, which is not read; save the model with it in "
                f"one of {', '.join(TYPES)}"
            )
        shape, start, stop = place.shape, place.start, place.stop
        if rows is not None and shape:
            size = (stop - start) // max(shape[0], 1)
            first, last = (min(row, shape[0]) for row in rows)
            shape, start, stop = (last - first, *shape[1:]), start + first * size, start + last * size
        content = torch.empty(stop - start, dtype=torch.uint8)
        left = content.numpy().data
        try:
            with place.path.open("rb", buffering=0) as stream:
                stream.seek(start)
                while left and (count := stream.readinto(left)):
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{name}: cannot read {str(place.path)!r} ({error})") from error
        if left:
            raise CheckpointError(f"{name}: {str(place.path)!r} ends before it; is the file complete?")
        return content.view(TYPES[place.dtype]).reshape(shape)

    def _indexed(self, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for file, path in self.paths.items():
            for name, tensor in read_header(file, path).items():
                if weight_map.get(name) != file:
                    raise CheckpointError(
                        f"{name}: stands in {str(path)!r}, and {INDEX_FILE} has it in {weight_map.get(name)!r}; the "
                        "files are not of one model, save it again"
                    )
                found[name] = tensor
        for name, file in weight_map.items():
            if name not in found:
                raise CheckpointError(
                    f"{name}: {INDEX_FILE} has it in {file!r} of {self.source!r}, where it is not; is the checkpoint "
                    "complete?"
                )
        return found

    def _shard(self, file: str) -> Path:
        path = self._located(file)
        if path is None:
            raise CheckpointError(f"{self.source!r} lacks the shard {file!r} of its index; is the checkpoint complete?")
        return path

    def _located(self, file: str) -> Path | None:
        try:
            path: str | None = cached_file(
                self.source,
                file,
                revision=self._revision,
                local_files_only=True,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except _UNREADABLE as error:
            raise CheckpointError(f"cannot open {self.source!r} ({error})") from error
        return None if path is None else Path(path)


def read_header(file: str, path: Path) -> dict[str, StoredTensor]:
    """Read what a safetensors file says of its tensors.

    Args:
        file: Name of the file in its folder.
        path: Where that is.

    Returns:
        Its tensors by name, in the order of their bytes.

    Raises:
        CheckpointError: The file is not one, or says what cannot be.
    """
    try:
        with safe_open(path, framework="np"):  # checks types, shapes, offsets, and that the file is as long as they say
            start = data_start(path)
            with path.open("rb") as stream:
                header = json.loads(stream.read(start)[LENGTH_BYTES:], object_pairs_hook=_unique)
    except _UNREADABLE as error:
        raise CheckpointError(f"cannot read {str(path)!r} ({error}); is the file complete?") from error
    header.pop("__metadata__", None)
    tensors = {
        name: StoredTensor(
            file=file,
            path=path,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            start=start + entry["data_offsets"][0],
            stop=start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }
    return dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))


def data_start(path: Path) -> int:
    """Length of the header of a safetensors file, with the number in front of it.

    Args:
        path: The file.

    Returns:
        The place of the first byte of its tensors.
    """
    with path.open("rb") as stream:
        return LENGTH_BYTES + int.from_bytes(stream.read(LENGTH_BYTES), "little")


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"larger than {LARGEST_INDEX} bytes")
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map names no weights")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is no index of shards ({error!r}); save the model again") from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or set(file) & {"/", "\\", "\0"} or file in (".", ".."):
            raise CheckpointError(
                f"{name}: {str(path)!r} names the shard {file!r}, which is no file of that folder; save the model again"
            )
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
