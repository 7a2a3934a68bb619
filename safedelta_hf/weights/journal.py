"""Weights are replaced all together or not at all."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor

from safedelta_hf.distributed.model import Parameter, ShardedModel
from safedelta_hf.distributed.ranks import Ranks, is_shared
from safedelta_hf.errors import RestoreError
from safedelta_hf.folders import ScratchFolder
from safedelta_hf.weights.readers import WeightReader


class Journal:
    """Replaces parameters in place and puts all of them back if the block fails.

    The originals are kept on disk, one file each, so that undoing costs no memory; of a parameter that every process
    holds whole, the main process alone keeps it. Their folder is removed at the end, unless putting them back failed:
    then it is kept, and the error names it.

    Args:
        folder: Where to make the temporary folder; None for the system's default.
        ranks: The processes that replace their shards of the same parameters, in the same order.
    """

    def __init__(self, folder: Path | None = None, ranks: Ranks | None = None) -> None:
        self._parent = folder
        self._ranks = ranks or Ranks()
        self._scratch: ScratchFolder | None = None
        self._saved: dict[str, tuple[Parameter, Path | None]] = {}
        self._replaced: set[str] = set()

    def __enter__(self) -> "Journal":
        self._saved, self._replaced, self._scratch = {}, set(), None
        try:
            with self._ranks.together():
                self._scratch = ScratchFolder(self._parent or Path(tempfile.gettempdir()))
        except BaseException:
            if self._scratch is not None:
                self._scratch.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        scratch, self._scratch = self._opened(), None
        if error is not None and not is_shared(error) and self._replaced:
            # A rank that failed where the others cannot know it has nobody to put parameters back with.
            error.add_note(
                "weights were being replaced; those from before are safetensors files, by parameter name, in "
                f"{str(scratch.path)!r} of each process that kept any"
            )
            scratch.keep()
            return
        if error is not None and is_shared(error):
            try:
                self._put_back(scratch.path)
            except BaseException:
                scratch.keep()
                raise
        scratch.remove()

    def replace(self, parameter: Parameter, value: Tensor) -> None:
        """Write a new value into a parameter, once its original is safe on all ranks.

        Args:
            parameter: Changed in place; its original is kept under its name.
            value: Of the shape of the shard that this process holds; cast to the dtype of the parameter.

        Raises:
            RuntimeError: The journal is not open.
        """
        folder, name = self._opened().path, parameter.name
        if name not in self._saved:
            self._saved[name] = parameter, self._save(parameter, folder)
        self._ranks.check_in()
        self._replaced.add(name)
        parameter.write(value)

    def restore(self) -> None:
        """Put back every parameter that was replaced, bit for bit; they may be replaced again.

        Raises:
            RestoreError: That failed, on this rank or on another.
        """
        self._put_back(self._opened().path)

    def _put_back(self, folder: Path) -> None:
        left: list[str] = []
        try:
            with self._ranks.together():
                replaced = set().union(*self._ranks.gather(self._replaced))
                left.extend(name for name in self._saved if name in replaced)
                while left:
                    parameter, path = self._saved[left[-1]]
                    parameter.write(self._original(parameter, path))
                    left.pop()
        except BaseException as error:
            where = f"their originals are safetensors files, by parameter name, in {str(folder)!r}"
            error.add_note(f"{len(left)} weights were not put back; {where}")
            if isinstance(error, Exception):
                raise RestoreError(
                    f"{len(left)} weights were not put back ({type(error).__name__}: {error}), so the model holds "
                    f"neither the weights from before nor the adjusted ones; {where}"
                ) from error
            raise
        self._replaced.clear()

    def _opened(self) -> ScratchFolder:
        if self._scratch is None:
            raise RuntimeError("a Journal is used as a context manager")
        return self._scratch

    def _save(self, parameter: Parameter, folder: Path) -> Path | None:
        value = parameter.read()  # on all ranks: reading may be collective
        if parameter.shard.is_whole and not self._ranks.is_main:
            return None
        path = folder / f"{len(self._saved):05d}.safetensors"
        save_file({parameter.name: value.contiguous()}, path)
        return path

    def _original(self, parameter: Parameter, path: Path | None) -> Tensor:
        original = None
        if path is not None:
            (original,) = load_file(path).values()
        if parameter.shard.is_whole:
            original = self._ranks.broadcast(original, owner=0)
        assert original is not None, "a rank without a file is given the original"
        return original


@contextmanager
def base_weights_loaded(
    model: ShardedModel, names: Iterable[str], base: WeightReader, folder: Path | None
) -> Iterator[None]:
    """Let the base weights stand in for the tuned ones, and put those back bit for bit however the block ends.

    Args:
        model: The tuned model.
        names: Canonical names of the parameters to replace.
        base: Where the base weights are read.
        folder: Where to make the temporary folder that holds the tuned weights meanwhile.

    Yields:
        Nothing.
    """
    with Journal(folder, model.ranks) as journal, model.ranks.together():
        for name in names:
            parameter = model.parameter(name, lent=True)
            journal.replace(parameter, base.read(name, parameter.shard))
        yield
        journal.restore()
