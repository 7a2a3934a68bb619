"""Safetensors files that are filled one tensor at a time, in any order, at the places that a header gives them."""

import hashlib
import os
from collections.abc import Collection
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from safedelta_hf.errors import CheckpointError
from safedelta_hf.folders import sync
from safedelta_hf.weights.safetensors_files import SafetensorsFiles, StoredTensor, data_start

PART = ".part"
"""Ends the name of a file that is not complete, so that nothing loads it."""

CHUNK = 1 << 24
"""Bytes that are copied or digested at a time."""


class ShardParts:
    """Copies of the shards of a model with the same headers, in which any tensor can get other values.

    Args:
        folder: Where they are made.
        original: The model.
    """

    def __init__(self, folder: Path, original: SafetensorsFiles) -> None:
        self._folder = folder
        self._original = original

    @property
    def names(self) -> frozenset[str]:
        """Names of the files until they are finished."""
        return frozenset(self._part(file).name for file in self._original.paths)

    def allocate(self) -> None:
        """Make every file that is not there yet, as long as its original, with its header and without its tensors.

        Files that were finished before are opened again.
        """
        for file, path in self._original.paths.items():
            part, size, start = self._part(file), path.stat().st_size, data_start(path)
            if (finished := self._folder / file).exists():
                os.replace(finished, part)
            with path.open("rb") as stream:
                header = stream.read(start)
            if not _begins(part, header, size):
                with part.open("wb") as stream:
                    write_all(stream.fileno(), header)
                    stream.truncate(size)

    def write(self, name: str, value: Tensor) -> None:
        """Write a tensor.

        Args:
            name: As in the files.
            value: Of its type and size.
        """
        place = self._original.tensors[name]
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert len(content) == place.stop - place.start, "the header promises another size"
        with self._opened(place) as stream:
            write_all(stream.fileno(), content)

    def copy(self, name: str) -> None:
        """Write a tensor as the original has it.

        Args:
            name: As in the files.

        Raises:
            CheckpointError: The original has been cut off since its header was read.
        """
        place = self._original.tensors[name]
        with place.path.open("rb") as source, self._opened(place) as stream:
            source.seek(place.start)
            left = place.stop - place.start
            while left:
                content = source.read(min(left, CHUNK))
                if not content:
                    raise CheckpointError(f"{name}: {str(place.path)!r} ends before it, changed meanwhile?")
                write_all(stream.fileno(), content)
                left -= len(content)

    def digest(self, names: Collection[str]) -> str:
        """Digest of what has been written of some tensors.

        Args:
            names: As in the files.

        Returns:
            SHA-256 over their bytes, in the order of the names.
        """
        result = hashlib.sha256()
        for name in names:
            place = self._original.tensors[name]
            with self._part(place.file).open("rb") as stream:
                stream.seek(place.start)
                for start in range(place.start, place.stop, CHUNK):
                    result.update(stream.read(min(CHUNK, place.stop - start)))
        return result.hexdigest()

    def finish(self) -> None:
        """Give every file its name, once all of them are safe on disk."""
        parts = {self._part(file): self._folder / file for file in self._original.paths}
        for part in parts:
            sync(part)
        for part, path in parts.items():
            os.replace(part, path)

    def _part(self, file: str) -> Path:
        return self._folder / f"{file}{PART}"

    def _opened(self, place: StoredTensor) -> FileIO:
        stream = self._part(place.file).open("r+b", buffering=0)
        stream.seek(place.start)
        return stream


def write_all(descriptor: int, content: "bytes | memoryview") -> None:
    """Write to a file, whole.

    Args:
        descriptor: The file, at the place to write to.
        content: What to write.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left[:CHUNK]) :]


def _begins(part: Path, header: bytes, size: int) -> bool:
    if not part.is_file() or part.stat().st_size != size:
        return False
    with part.open("rb") as stream:
        return stream.read(len(header)) == header
