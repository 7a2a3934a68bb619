"""The two things that a folder of a fine-tune may hold: how each is measured in memory, and written as files."""

import math
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel
from typing_extensions import override

from safedelta_hf.adapter.adjust import adjust_adapter
from safedelta_hf.adapter.files import adjust_adapter_files, opened_adapter
from safedelta_hf.checkpoint.adjust import adjust_planned
from safedelta_hf.checkpoint.folder import require_absent
from safedelta_hf.checkpoint.lineage import require_order
from safedelta_hf.checkpoint.plan import (
    CheckpointPlan,
    open_base_files,
    open_tuned_files,
    plan_checkpoint,
    require_apart,
)
from safedelta_hf.deltas.lora_settings import CONFIG_FILE
from safedelta_hf.errors import (
    AdapterError,
    BaseWeightsError,
    CheckpointError,
    ConfigurationError,
    SafeDeltaWarning,
    warn,
)
from safedelta_hf.model.adjust import adjust_model
from safedelta_hf.modules.loading import Source, load_base, source_of, with_adapter
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Treatment
from safedelta_hf.report import Report
from safedelta_hf.report.provenance import renew_provenance
from safedelta_hf.rules import Rule
from safedelta_hf.saved.memory import devices_of
from safedelta_hf.weights.safetensors_files import TYPES, SafetensorsFiles

TOLERANCE: Final = 0.01
"""Share by which figures of what is written may differ from those of what was measured, before it is told."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done.

    Attributes:
        rule: Which part of each delta to keep.
        profile: Profile of the base; None for a rule that needs no safety data.
        task: Profile of the base on the task data, for rules that weigh them.
        treatment: What to do with parameters other than linear weights.
        progress: Whether to show progress bars.
    """

    rule: Rule
    profile: SafetyProfile | None
    task: SafetyProfile | None
    treatment: Treatment | None
    progress: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """What every way to adjust takes of it."""
        return {
            "rule": self.rule,
            "profile": self.profile,
            "task_profile": self.task,
            "treatment": self.treatment,
            "progress": self.progress,
        }


class SavedTuned(ABC):
    """What was saved after fine-tuning, and the folder to write.

    Attributes:
        base: The model that the fine-tuning started from.
        files: The weights that have to fit in memory where the model is to run; None where they are not here yet.
        dtype: Data type to load them in.
        runs_on_base: Whether the fine-tune runs on the base in memory, rather than in its place.
        output: Folder to write.
    """

    base: Source
    files: SafetensorsFiles | None
    dtype: str
    runs_on_base: bool
    output: Path

    @abstractmethod
    def measured(self, base: PreTrainedModel | None, work: Work) -> Report:
        """Adjust what was saved in memory, at a measured strength.

        Args:
            base: The base model, where the fine-tune runs on it.
            work: What is to be done.

        Returns:
            What was done, and how the strength was found.
        """

    @abstractmethod
    def written(self, work: Work) -> Report:
        """Adjust what was saved, files to files, at a strength that is a number.

        Args:
            work: What is to be done.

        Returns:
            What was done.
        """


def opened_tuned(
    tuned: Path, output: Path, *, base: str | None, initial_adapter: Path | None, device: str
) -> SavedTuned:
    """Tell a folder of a model from that of an adapter, and open it.

    Args:
        tuned: The folder.
        output: Folder to write.
        base: Name or folder of the base; may be None for an adapter that names it.
        initial_adapter: Folder of the adapter before training, where that took a part of the base with it.
        device: Where to compute, as transformers takes it.

    Returns:
        What it holds.

    Raises:
        ConfigurationError: Something is missing that its kind needs, or was given that it does not take.
    """
    if (tuned / CONFIG_FILE).is_file() and not (tuned / "config.json").is_file():
        return SavedAdapter(tuned, output, base=base, initial_adapter=initial_adapter, device=device)
    if base is None:
        raise ConfigurationError("base: a whole model needs it (--base), the model that the fine-tuning started from")
    if initial_adapter is not None:
        raise ConfigurationError(f"initial_adapter (--initial-adapter): {str(tuned)!r} holds no adapter; leave it out")
    return SavedModel(tuned, output, base=base, device=device)


class SavedModel(SavedTuned):
    """A whole model, in one file or in shards.

    Args:
        tuned: Its folder.
        output: Folder to write.
        base: Folder or cached repository of the base.
        device: Where to compute.
    """

    runs_on_base = False

    def __init__(self, tuned: Path, output: Path, *, base: str, device: str) -> None:
        require_apart(output, base, tuned)
        require_absent(output)
        require_order(base, tuned)
        self.base = Source(base)
        self.files = open_tuned_files(tuned)
        self.dtype = _data_type(self.files)
        self._tuned, self.output, self._device = tuned, output, device
        _require_same_shapes(open_base_files(base), self.files)

    @override
    def measured(self, base: PreTrainedModel | None, work: Work) -> Report:
        weights = self._plan(work).pair.base
        what = f"tuned: {str(self._tuned)!r}"
        model = load_base(Source(str(self._tuned)), what, dtype=self.dtype, device_map=self._device)
        return adjust_model(model, base=weights, workspace=self.output.absolute().parent, **work.arguments)

    @override
    def written(self, work: Work) -> Report:
        plan = self._plan(work)
        return adjust_planned(plan, device=_computing_on(self._device), progress=work.progress)

    def _plan(self, work: Work) -> CheckpointPlan:
        arguments = work.arguments
        del arguments["progress"]
        return plan_checkpoint(base=self.base.base, tuned=self._tuned, output=self.output, **arguments)


class SavedAdapter(SavedTuned):
    """An adapter that PEFT saved.

    Args:
        tuned: Its folder.
        output: Folder to write.
        base: Name or folder of the base; the one that it names if None.
        initial_adapter: Folder of the adapter before training, where that took a part of the base with it.
        device: Where to measure.

    Raises:
        AdapterError: The output exists, or the adapter has no delta that can be adjusted.
    """

    runs_on_base = True
    dtype = "auto"

    def __init__(
        self, tuned: Path, output: Path, *, base: str | None, initial_adapter: Path | None, device: str
    ) -> None:
        if output.exists():
            raise AdapterError(f"output: {str(output)!r} exists already; remove it or choose another folder")
        opened_adapter(tuned, initial_adapter)  # what cannot be adjusted is found before anything is read
        self._tuned, self.output, self._base, self._device = tuned, output, base, device
        self._initial = initial_adapter

    @cached_property
    def base(self) -> Source:  # type: ignore[override]  # not asked for where no model is loaded
        """The model that the fine-tuning started from."""
        return source_of(str(self._tuned), "tuned", self._base)

    @cached_property
    def files(self) -> SafetensorsFiles | None:  # type: ignore[override]
        """Its weights; None where they are to be downloaded, or in another format."""
        try:
            return SafetensorsFiles(self.base.base, self.base.revision)
        except CheckpointError:
            return None

    @override
    def measured(self, base: PreTrainedModel | None, work: Work) -> Report:
        what = f"tuned: {str(self._tuned)!r}"
        base = base or load_base(self.base, what, dtype=self.dtype, device_map=self._device)
        with self._plain() as folder:
            model = with_adapter(base, str(folder), what)
            parent = self.output.absolute().parent
            return adjust_adapter(model, base=self._base, workspace=parent, **work.arguments)

    @override
    def written(self, work: Work) -> Report:
        return adjust_adapter_files(
            self._tuned, output=self.output, base=self._base, initial_adapter=self._initial, **work.arguments
        )

    @contextmanager
    def _plain(self) -> Iterator[Path]:
        # The adapter as one on the original base, as it can run there.
        if self._initial is None:
            yield self._tuned
            return
        with tempfile.TemporaryDirectory(prefix="safedelta-") as parent:
            opened_adapter(self._tuned, self._initial).write(Path(parent) / "adapter", {}, None)
            yield Path(parent) / "adapter"


def measured_and_written(saved: SavedTuned, base: PreTrainedModel | None, work: Work) -> Report:
    """Find the strength in memory, and write the files with it.

    Args:
        saved: What was saved.
        base: The base model, where it is in memory.
        work: What is to be done.

    Returns:
        What was written, with how the strength was found.
    """
    measured = saved.measured(base, work)
    assert measured.search is not None, "the strength was to be measured"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SafeDeltaWarning)  # all was told when the same was done in memory
        written = saved.written(replace(work, rule=work.rule.at(measured.search.strength)))
    report = replace(written, rule=measured.rule, search=measured.search, unverified=measured.unverified)
    renew_provenance(saved.output, report)
    _warn_if_other(measured, report)
    return report


def _warn_if_other(measured: Report, written: Report) -> None:
    found = {one.parameter: one for one in measured.parameters}
    for one in written.parameters:
        other = found.get(one.parameter, one)
        pairs = ((one.lost_energy, other.lost_energy), (one.adjusted_loss or 0.0, other.adjusted_loss or 0.0))
        if not all(math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=1e-12) for pair in pairs):
            warn(
                f"{one.parameter}: what was written differs by more than {TOLERANCE:.0%} from what was measured in "
                "memory; measure the output too (safedelta eval)"
            )
            return


def _data_type(files: SafetensorsFiles) -> str:
    # That of most bytes: what the configuration says may be another, and what is measured has to be what is written.
    sizes = Counter[str]()
    for tensor in files.tensors.values():
        sizes[tensor.dtype] += tensor.stop - tensor.start
    kind = TYPES.get(sizes.most_common(1)[0][0])
    return "auto" if kind is None or not kind.is_floating_point else str(kind).removeprefix("torch.")


def _computing_on(device: str) -> torch.device:
    first = devices_of(device)[0]
    return torch.device("cpu") if first.type == "mps" else first  # which has no float64, for what float32 cannot factor


def _require_same_shapes(base: SafetensorsFiles, tuned: SafetensorsFiles) -> None:
    for name, tensor in tuned.tensors.items():
        if name in base.tensors and base.tensors[name].shape != tensor.shape:
            raise BaseWeightsError(
                f"{name}: {list(tensor.shape)} in {tuned.source!r}, {list(base.tensors[name].shape)} in the base "
                f"{base.source!r}; was the vocabulary resized? Give the base with the new size"
            )
