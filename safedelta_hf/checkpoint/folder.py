"""A folder of model weights that is written over several runs if need be, and is complete or not there at all."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from safedelta_hf.checkpoint.shards import ShardParts, write_all
from safedelta_hf.errors import CheckpointError, OutputError
from safedelta_hf.folders import complete_file, locked, sync, unfinished_of
from safedelta_hf.records import ParameterRecord
from safedelta_hf.weights.safetensors_files import INDEX_FILE, SafetensorsFiles

MANIFEST_FILE = "manifest.json"
FINISHED_FILE = "finished.jsonl"
MODEL_FOLDER = "model"

_OWN = frozenset([MANIFEST_FILE, f"{MANIFEST_FILE}.part", FINISHED_FILE, MODEL_FOLDER, INDEX_FILE])
"""All that a work folder of this kind can hold."""


class CheckpointFolder:
    """Writes a copy of a checkpoint in which some weights are others, in the same shards.

    Everything is made in a work folder beside the output, `.NAME.unfinished`, which holds a manifest of what the output
    is made from, one line for each weight that is finished, and the shards. A run that was stopped is taken up by the
    next one with the same manifest. The folder is renamed to the output once it is complete.

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
        self._manifest = json.loads(json.dumps(manifest))
        self._progress = progress
        self._work = unfinished_of(output)
        self._model = self._work / MODEL_FOLDER
        self._parts = ShardParts(self._model, original)
        self._lock = ExitStack()
        self._written: set[str] = set()
        self.finished: dict[str, ParameterRecord] = {}
        self.is_complete = False

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
        # A run that stopped half-way is worth keeping, but for one that never got anywhere.
        if self.is_complete or not self.finished:
            shutil.rmtree(self._work, ignore_errors=True)
        self._lock.close()

    def write(self, name: str, value: Tensor) -> None:
        """Write another value than the original has.

        Args:
            name: Of the tensor, as in the files.
            value: In the dtype and shape of the original.
        """
        self._parts.write(name, value)
        self._written.add(name)

    def keep(self, record: ParameterRecord, names: Sequence[str]) -> None:
        """Record that a weight is finished; what was not written of it is copied from the original.

        Args:
            record: What was done with it.
            names: Under which it stands in the files.
        """
        for name in names:
            if name not in self._written:
                self._parts.copy(name)
        line = {"record": asdict(record), "names": list(names), "sha256": self._parts.digest(names)}
        with (self._work / FINISHED_FILE).open("ab") as stream:
            write_all(stream.fileno(), json.dumps(line).encode() + b"\n")
        self.finished[record.parameter] = record

    def complete(self, companions: Sequence[str]) -> None:
        """Finish the shards, add what stands beside them, and the index last; then rename the folder.

        Args:
            companions: Files of the original's folder that belong to it.

        Raises:
            CheckpointError: One of them has the name of a file that is being written.
        """
        source = Path(self._original.source)
        for name in companions:
            target = self._model / name
            if target.exists():
                raise CheckpointError(
                    f"output: {str(source / name)!r} stands in the way, the output has weights in a file of that name "
                    "until it is complete; rename or remove it"
                )
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
            sync(target)
        self._parts.finish()
        if (index := self._original.index) is not None:
            unfinished = self._work / index.name
            shutil.copyfile(index, unfinished)
            sync(unfinished)
            os.replace(unfinished, self._model / index.name)
        sync(self._model)
        # The next run takes its report from there if this one ends between the renaming and the clean-up.
        if (finished := self._work / FINISHED_FILE).exists():
            sync(finished)
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
        manifest, is_renamed = self._read_manifest(), self._output.exists() and not self._model.exists()
        lines = self._read_finished() if manifest == self._manifest else []
        if is_renamed and lines:
            # Stopped between the renaming and the removal of the work folder.
            self.finished = {record.parameter: record for record, _, _ in lines}
            self.is_complete = True
            return
        if self._output.exists():
            if is_renamed:
                shutil.rmtree(self._work, ignore_errors=True)
            raise CheckpointError(_taken(self._output))
        if manifest is None:
            self._begin()
        elif manifest != self._manifest:
            raise CheckpointError(self._begun_otherwise(manifest))
        self._model.mkdir(exist_ok=True)
        self._parts.allocate()
        self._clear()
        for record, names, digest in tqdm(
            lines, desc="Verifying finished weights", unit="weight", disable=not self._progress or not lines
        ):
            if set(names) <= self._original.tensors.keys() and self._parts.digest(names) == digest:
                self.finished[record.parameter] = record

    def _require_own(self) -> None:
        # Another kind of folder may have been begun under the same name.
        if strangers := sorted({path.name for path in self._work.iterdir()} - _OWN):
            raise CheckpointError(
                f"output: {str(self._work)!r} is left of something else that was being written, it holds "
                f"{strangers[0]!r}; finish that, or remove the folder, or choose another output"
            )

    def _begin(self) -> None:
        # What stands there without a manifest is left of a removal that was interrupted.
        if self._model.exists():
            shutil.rmtree(self._model)
        (self._work / FINISHED_FILE).unlink(missing_ok=True)
        self._write_manifest()

    def _clear(self) -> None:
        # What stands beside the weights is copied again at the end; it may have changed meanwhile.
        for path in self._model.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self._parts.names:
                path.unlink()

    def _read_manifest(self) -> Any:  # noqa: ANN401 - whatever the file holds
        try:
            return json.loads((self._work / MANIFEST_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            return "malformed"

    def _write_manifest(self) -> None:
        with complete_file(self._work / MANIFEST_FILE) as part, part.open("wb") as stream:
            write_all(stream.fileno(), json.dumps(self._manifest, indent=1).encode())

    def _read_finished(self) -> list[tuple[ParameterRecord, list[str], str]]:
        path = self._work / FINISHED_FILE
        if not path.exists():
            return []
        lines, whole = path.read_bytes().splitlines(keepends=True), 0
        result = []
        for line in lines:
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                content = json.loads(line)
                result.append((_record(content["record"]), list(content["names"]), str(content["sha256"])))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                break  # what follows may be as damaged; its weights are done again
            whole += len(line)
        os.truncate(path, whole)
        return result

    def _begun_otherwise(self, manifest: object) -> str:
        differing = ["manifest"]
        if isinstance(manifest, dict):
            keys = manifest.keys() | self._manifest.keys()
            differing = sorted(key for key in keys if manifest.get(key) != self._manifest.get(key))
        return (
            f"output: {str(self._work)!r} is left of a run that was stopped and that had another "
            f"{', '.join(differing)}; repeat that run to finish it, or remove the folder, or choose another output"
        )


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


def _record(values: Mapping[str, Any]) -> ParameterRecord:
    fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}
    return ParameterRecord(**fields)
