"""A folder of model weights that is written over several runs if need be, and is complete or not there at all."""

import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from safedelta_hf.errors import BaseWeightsError, CheckpointError, NumericalError, OutputError
from safedelta_hf.folders import RunLog, locked, sync, unfinished_of, write_all
from safedelta_hf.report import Report
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.report.provenance import write_provenance
from safedelta_hf.report.records import ParameterRecord
from safedelta_hf.weights.safetensors_files import INDEX_FILE, SafetensorsFiles, StoredTensor, data_start

LOG_FILE = "finished.jsonl"
MODEL_FOLDER = "model"

PART = ".part"
"""Ends the name of a file that is not complete, so that nothing loads it."""

CHUNK = 1 << 24
"""Bytes that are copied or digested at a time."""

_OWN = frozenset([LOG_FILE, MODEL_FOLDER, INDEX_FILE])
"""All that a work folder of this kind can hold."""

_Finished = tuple[ParameterRecord, list[str], str]
"""What was done with a weight, its names in the files, and the SHA-256 of its bytes there."""


class _Bytes:
    """What has been written of some tensors, one after another."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._digest = hashlib.sha256()

    def add(self, name: str, content: memoryview | bytes) -> None:
        """Take note of what was written of a tensor.

        Args:
            name: As in the files.
            content: The bytes that follow those before.
        """
        if self.names[-1:] != [name]:
            self.names.append(name)
        self._digest.update(content)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return self._digest.hexdigest()


class CheckpointFolder:
    """Writes a copy of a checkpoint in which some weights are others, in the same shards.

    Everything is made in a work folder beside the output, `.NAME.unfinished`, which holds the shards, and a log with
    one line for each weight that is finished. A run that was stopped is taken up by the next one with the same
    manifest. The folder is renamed to the output once it is complete.

    Args:
        output: The folder to write; must not exist.
        original: The checkpoint.
        manifest: What the output is made from, as plain values.
        progress: Whether to show progress bars.
    """

    def __init__(
        self, output: Path, original: SafetensorsFiles, manifest: Mapping[str, Any], *, progress: bool
    ) -> None:
        self._output = output
        self._original = original
        self._manifest = manifest
        self._progress = progress
        self._work = unfinished_of(output)
        self._model = self._work / MODEL_FOLDER
        self._shards = UnfinishedShards(self._model, original)
        self._lock = ExitStack()
        self._under_way = _Bytes()
        self.finished: dict[str, ParameterRecord] = {}
        self.is_complete = False
        self._is_last_step = False

    def __enter__(self) -> "CheckpointFolder":
        require_absent(self._output)
        try:
            self._lock.enter_context(locked(self._output))
        except OutputError as error:
            raise CheckpointError(f"output: {error}") from error
        try:
            self._work.mkdir(exist_ok=True)
            self._take_up()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A run that stopped half-way is worth keeping, but not where it only copied, nor of models that cannot be used.
        has_changed = any(record.outcome in ("adjusted", "reset") for record in self.finished.values())
        is_unusable = isinstance(error, NumericalError | BaseWeightsError | CheckpointError) and not self._is_last_step
        if self.is_complete or not has_changed or is_unusable:
            shutil.rmtree(self._work, ignore_errors=True)
        self._lock.close()

    def write(self, name: str, value: Tensor) -> None:
        """Write another value than the original has.

        Args:
            name: Of the tensor, as in the files.
            value: In the dtype and shape of the original.
        """
        self._under_way.add(name, self._shards.write(name, value))

    def keep(self, record: ParameterRecord, names: Sequence[str]) -> None:
        """Record that a weight is finished; what was not written of it is copied from the original.

        Args:
            record: What was done with it.
            names: Under which it stands in the files.
        """
        written, self._under_way = self._under_way, _Bytes()
        for name in names:
            if name not in written.names:
                for content in self._shards.copied(name):
                    written.add(name, content)
        # What is written is not read again, unless that was in another order.
        digest = written.digest if written.names == list(names) else self._shards.digest(names)
        line = {"record": asdict(record), "names": list(names), "sha256": digest}
        # The weight's own bytes are not waited for either: what did not reach the disk is found, and done again.
        self._log.append(line, sync=False)
        self.finished[record.parameter] = record

    def complete(self, other_files: Sequence[str], report: Report) -> None:
        """Add what stands beside the shards, finish these, and add the index last; then rename the folder.

        Args:
            other_files: Files of the original's folder that belong to it.
            report: What was done to its weights.

        Raises:
            CheckpointError: One of them has the name of a file that is being written.
        """
        self._is_last_step = True
        source = Path(self._original.source)
        for name in other_files:
            target = self._model / name
            if target.exists():
                raise CheckpointError(
                    f"output: {str(source / name)!r} stands in the way, the output has weights in a file of that name "
                    "until it is complete; rename or remove it"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
            sync(target)
        # Before the shards have their names: a folder that loads is complete, also if the run ends here.
        write_provenance(self._model, report, self._shards.parts)
        self._shards.finish()
        if (index := self._original.index) is not None:
            unfinished = self._work / index.name
            shutil.copyfile(index, unfinished)
            sync(unfinished)
            os.replace(unfinished, self._model / index.name)
        sync(self._model)
        # The next run takes its report from there if this one ends between the renaming and the clean-up.
        sync(self._log.path)
        sync(self._work)
        os.replace(self._model, self._output)
        sync(self._output.parent)
        self.is_complete = True

    def record(self, name: str) -> ParameterRecord:
        """What was done with a weight, in this run or an earlier one.

        Args:
            name: Canonical name.

        Returns:
            Its record.

        Raises:
            CheckpointError: There is none: the output was completed by a run that ended before it could report, and
                what it had noted down is damaged.
        """
        if name not in self.finished:
            raise CheckpointError(
                f"{name}: {str(self._output)!r} is complete, and the record of what was done with this weight is lost; "
                "remove the folder and run again for a report"
            )
        return self.finished[name]

    def _take_up(self) -> None:
        self._require_own()
        if self._output.exists():
            self._take_up_complete()
            return
        try:
            self._log = self._opened_log()
        except OutputError as error:
            raise CheckpointError(f"output: {error}") from error
        self._model.mkdir(exist_ok=True)
        self._shards.allocate()
        self._clear()
        for record, names, digest in progress_bar(
            self._log.entries,
            desc="Verifying finished weights",
            unit="weight",
            disable=not self._progress or not self._log.entries,
        ):
            if set(names) <= self._original.tensors.keys() and self._shards.digest(names) == digest:
                self.finished[record.parameter] = record

    def _take_up_complete(self) -> None:
        if not self._model.exists():
            # Stopped between the renaming and the removal of the work folder.
            with suppress(OutputError):
                self.finished = {record.parameter: record for record, _, _ in self._opened_log().entries}
            if self.finished:
                self.is_complete = True
                return
            shutil.rmtree(self._work, ignore_errors=True)
        raise CheckpointError(_taken(self._output))

    def _opened_log(self) -> RunLog[_Finished]:
        return RunLog(self._work / LOG_FILE, self._manifest, _finished)

    def _require_own(self) -> None:
        # Another kind of folder may have been begun under the same name.
        if strangers := sorted({path.name for path in self._work.iterdir()} - _OWN):
            raise CheckpointError(
                f"output: {str(self._work)!r} is left of something else that was being written, it holds "
                f"{strangers[0]!r}; finish that, or remove the folder, or choose another output"
            )

    def _clear(self) -> None:
        # What stands beside the weights is copied again at the end; it may have changed meanwhile.
        for path in self._model.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._shards.names:
                path.unlink()


class UnfinishedShards:
    """Copies of the shards of a model with the same headers, in which any tensor can get other values.

    Args:
        folder: Where they are made.
        original: The model.
    """

    def __init__(self, folder: Path, original: SafetensorsFiles) -> None:
        self._folder = folder
        self._original = original

    @property
    def parts(self) -> dict[str, Path]:
        """The files until they are finished, by the names that they get then."""
        return {file: self._part(file) for file in self._original.paths}

    @property
    def names(self) -> frozenset[str]:
        """Names of the files until they are finished."""
        return frozenset(part.name for part in self.parts.values())

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

    def write(self, name: str, value: Tensor) -> memoryview:
        """Write a tensor.

        Args:
            name: As in the files.
            value: Of its type and size.

        Returns:
            The bytes that were written.
        """
        place = self._original.tensors[name]
        content: memoryview = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert len(content) == place.stop - place.start, "the header promises another size"
        with self._opened(place) as stream:
            write_all(stream.fileno(), content)
        return content

    def copied(self, name: str) -> Iterator[bytes]:
        """Write a tensor as the original has it.

        Args:
            name: As in the files.

        Yields:
            The bytes that were written, piece by piece.

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
                yield content
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
        for part in self.parts.values():
            sync(part)
        for file, part in self.parts.items():
            os.replace(part, self._folder / file)

    def _part(self, file: str) -> Path:
        return self._folder / f"{file}{PART}"

    def _opened(self, place: StoredTensor) -> FileIO:
        stream = self._part(place.file).open("r+b", buffering=0)
        stream.seek(place.start)
        return stream


def require_absent(output: Path) -> None:
    """Make sure that an output can be written.

    Args:
        output: The folder to write.

    Raises:
        CheckpointError: It exists, and no unfinished run can have left it.
    """
    if output.exists() and not unfinished_of(output).exists():
        raise CheckpointError(_taken(output))


def _taken(output: Path) -> str:
    return f"output: {str(output)!r} exists already; remove it or choose another folder"


def _finished(line: Mapping[str, Any]) -> _Finished:
    fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in line["record"].items()}
    return ParameterRecord(**fields), list(line["names"]), str(line["sha256"])


def _begins(part: Path, header: bytes, size: int) -> bool:
    if not part.is_file() or part.stat().st_size != size:
        return False
    with part.open("rb") as stream:
        return stream.read(len(header)) == header
