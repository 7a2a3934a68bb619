"""Weights are replaced all together or not at all."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safedelta_hf.weights.base import BaseWeights


class Journal:
    """Replaces parameters in place and puts all of them back if the block fails.

    The originals are kept on disk, one file each, so that undoing costs no memory. Their folder is removed at the end,
    unless putting them back failed: then it is kept, and the error names it.

    Args:
        folder: Where to make the temporary folder; None for the system's default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._parent = folder
        self._folder: Path | None = None
        self._saved: dict[str, tuple[Tensor, Path]] = {}
        self._replaced: list[str] = []

    def __enter__(self) -> "Journal":
        if self._parent is not None:
            self._parent.mkdir(parents=True, exist_ok=True)
        self._saved, self._replaced = {}, []
        self._folder = Path(tempfile.mkdtemp(prefix=".safedelta-", dir=self._parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.restore()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def replace(self, name: str, parameter: Tensor, value: Tensor) -> None:
        """Write a new value into a parameter, once its original is safe.

        Args:
            name: Canonical name, under which the original is kept.
            parameter: Changed in place.
            value: Of the same shape; cast to the dtype of the parameter.

        Raises:
            RuntimeError: The journal is not open.
        """
        if self._folder is None:
            raise RuntimeError("a Journal is used as a context manager")
        if name not in self._saved:
            path = self._folder / f"{len(self._saved):05d}.safetensors"
            save_file({name: parameter.detach().contiguous()}, path)
            self._saved[name] = (parameter, path)
        self._replaced.append(name)
        with torch.no_grad():
            parameter.copy_(value)

    def restore(self) -> None:
        """Put back every parameter that was replaced, bit for bit; they may be replaced again."""
        try:
            while self._replaced:
                parameter, path = self._saved[self._replaced[-1]]
                (original,) = load_file(path).values()
                with torch.no_grad():
                    parameter.copy_(original)
                self._replaced.pop()
        except BaseException as error:
            error.add_note(
                f"{len(self._replaced)} weights were not put back; their originals are safetensors files, by parameter "
                f"name, in {str(self._folder)!r}"
            )
            raise


@contextmanager
def standing_in(parameters: Mapping[str, Tensor], base: BaseWeights, folder: Path | None) -> Iterator[None]:
    """Let the base weights stand in for the tuned ones, and put those back bit for bit however the block ends.

    Args:
        parameters: Parameters to replace, by canonical name.
        base: Where the base weights are read.
        folder: Where to make the temporary folder that holds the tuned weights meanwhile.

    Yields:
        Nothing.
    """
    with Journal(folder) as journal:
        for name, parameter in parameters.items():
            journal.replace(name, parameter, base.read(name))
        yield
        journal.restore()
