"""All of an adjustment from files to files: read what is missing with the base, measure the strength, write."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from transformers import PreTrainedModel

from safedelta_hf.adjust.plan import check_rule
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.data.dataset import Source, read_safety_data
from safedelta_hf.data.forms import is_tokenised
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.data.rows import read_rows
from safedelta_hf.data.templates import ProcessingClass, require_processing_class
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError, NothingLeftError, ProfileError, naming_foreign_errors, require_kind
from safedelta_hf.folders import require_absent, require_writable
from safedelta_hf.hf.profiles import ProfileCollector, RunData, examples_of, require_config_used, require_use
from safedelta_hf.modules.loading import load_base, load_tokenizer
from safedelta_hf.profile.profile import SafetyProfile, opened_profile, with_ordinary
from safedelta_hf.records.plan import Treatment
from safedelta_hf.records.sorting import TaskSorting
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, rule_of
from safedelta_hf.saved.folders import SavedTuned, Work, measured_and_written, opened_tuned
from safedelta_hf.saved.memory import devices_of, require_memory
from safedelta_hf.weights.digest import fingerprint

OWNER: Final = "adjust_saved"

TASK_DATA: Final = "task data"
ORDINARY_DATA: Final = "ordinary data"


@naming_foreign_errors("adjusting what was saved", "there is no output")
def adjust_saved(
    *,
    tuned: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    safety_dataset: Source | None = None,
    profile: SafetyProfile | str | Path | None = None,
    task_dataset: Source | None = None,
    task_profile: SafetyProfile | str | Path | None = None,
    ordinary_dataset: Source | None = None,
    ordinary_profile: SafetyProfile | str | Path | None = None,
    ordinary_weight: float = 0.1,
    task_examples: int = 256,
    sort_task: bool = True,
    rule: Rule | str | None = None,
    config: ProfileConfig | None = None,
    treatment: Treatment | None = None,
    initial_adapter: str | Path | None = None,
    processing_class: ProcessingClass | None = None,
    save_profile: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Report:
    """Adjust a fine-tuned model or adapter in its folder, as `SafeDeltaCallback` does at the end of training.

    What the rule needs and is not given is read with the base: safety data, ordinary data, task data without what the
    base would refuse. A strength that is to be measured is measured with the model in memory. The output is then
    written as `adjust_checkpoint` and `adjust_adapter_files` write it, with that strength.

    Where base and profile are at hand and the strength is a number, no model is loaded, and memory holds one layer.

    Args:
        tuned: Folder of the fine-tuned model in safetensors, or of a LoRA adapter that PEFT saved.
        output: Folder to write; must not exist.
        base: The model that the fine-tuning started from, a folder or cached repository; the one that an adapter names
            if None.
        safety_dataset: Harmful prompts with the base's refusals, as in `SafeDeltaCallback`; not needed by rules that
            read none, such as `Scale(strength=1.0)`.
        profile: A safety profile of the base made before, or its folder, instead.
        task_dataset: The fine-tuning data, for rules that weigh them.
        task_profile: A profile of those made before, or its folder, instead.
        ordinary_dataset: Ordinary prompts with the base's responses, to protect them too.
        ordinary_profile: A profile of those made before, or its folder, instead.
        ordinary_weight: Weight of that data against the safety data.
        task_examples: Number of its rows to draw, at most: those that the callback would draw of the same data.
        sort_task: Whether examples of the task that the base would refuse are left out; if none is left, the rule is
            used without a task.
        rule: Which part of each delta to keep, or the name of a rule; `TaskRidge()` with task data, else `Ridge()`, if
            None. Both measure their strength.
        config: How data is read, and which linear weights are adjusted; `ProfileConfig()` if None.
        treatment: What to do with parameters other than linear weights.
        initial_adapter: Folder of the adapter before training, if its initialisation took a part of the base with it
            (PiSSA, ...).
        processing_class: Tokenizer or processor of the data; that of the base if None.
        save_profile: Folder to keep the safety profile in, for other fine-tunes of this base; must not exist.
        device: A device, or a device map of transformers: where models are loaded and deltas computed.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter, and how the strength was found.

    Raises:
        ConfigurationError: Arguments are missing, of another kind or without effect, base and fine-tuned model are
            exchanged, or the model does not fit in memory.
        ProfileError: A profile was made of another base.
        OutputError: The output, or the folder of the profile, cannot be written.
        DataError: Data cannot be read, or there is too little to measure a strength by.
        SafeDeltaError: Named by parameter. Whatever was raised, what was given is as it was and there is no output.
    """
    for name, value in (("tuned", tuned), ("output", output)):
        require_kind(OWNER, name, value, (str, Path), "a folder")
    for name, optional in (("base", base), ("initial_adapter", initial_adapter), ("save_profile", save_profile)):
        require_kind(OWNER, name, optional, (str, Path, type(None)), "a folder")
    require_kind(OWNER, "config", config, (ProfileConfig, type(None)), "a ProfileConfig")
    require_processing_class(OWNER, processing_class)
    devices_of(device)
    rule = rule_of(OWNER, rule, task_dataset if task_profile is None else task_profile)
    data = RunData(
        owner=OWNER,
        safety=safety_dataset,
        ordinary=ordinary_dataset,
        ordinary_weight=ordinary_weight,
        task=task_dataset,
        task_examples=task_examples,
        sort_task=sort_task,
    )
    data = _drawn(data)
    profiles = _given(rule, data, profile, task_profile, ordinary_profile, config, save_profile)
    saved = opened_tuned(
        Path(tuned),
        Path(output),
        base=None if base is None else str(base),
        initial_adapter=None if initial_adapter is None else Path(initial_adapter),
        device=device,
    )
    require_writable(Path(output))
    if save_profile is not None:
        require_absent(Path(save_profile))
        require_writable(Path(save_profile))
    reading = _Reading(saved, rule, data, config or ProfileConfig(), device, progress)
    reading.require_possible()
    held, profiles = reading.profiles(profiles, processing_class, None if save_profile is None else Path(save_profile))
    work = Work(
        rule=rule if profiles.nothing_left is None else rule.without_task(),
        profile=profiles.safety,
        task=profiles.task,
        treatment=treatment,
        progress=progress,
    )
    report = saved.written(work) if rule.auto is None else measured_and_written(saved, held, work)
    return report if profiles.nothing_left is None else replace(report, sorting=profiles.nothing_left)


class _Profiles(NamedTuple):
    """What is known of the base.

    Attributes:
        safety: Its safety profile; None until that is collected, and for rules that need none.
        task: Its profile on the task data, for rules that weigh them; None until then.
        ordinary: Its profile on ordinary data, to be protected too; None where there is none, or it is in the first.
        nothing_left: How the task was sorted, where the base would refuse all of it.
    """

    safety: SafetyProfile | None
    task: SafetyProfile | None
    ordinary: SafetyProfile | None = None
    nothing_left: TaskSorting | None = None

    def require_of(self, digests: Mapping[str, str]) -> None:
        """Make sure that what was given was made of the base, before anything is read with it.

        Args:
            digests: Digest of each of its parameters.

        Raises:
            ProfileError: It was made of another.
        """
        given = {"profile": self.safety, "task_profile": self.task, "ordinary_profile": self.ordinary}
        for name, profile in given.items():
            if profile is not None and dict(profile.header.base) != dict(digests):
                raise ProfileError(
                    f"{OWNER}: {name} was made of another base ({profile.header.model}), or of this one in another "
                    "precision; collect it again, of the base that is given"
                )


def _drawn(data: RunData) -> RunData:
    # Once, so that what is checked is what is read.
    if data.task is None:
        return data
    rows = [row for _, row in read_rows(data.task)] if isinstance(data.task, str | Path) else data.task
    return replace(data, task=examples_of(rows, data.task_examples))


def _given(
    rule: Rule,
    data: RunData,
    profile: SafetyProfile | str | Path | None,
    task_profile: SafetyProfile | str | Path | None,
    ordinary_profile: SafetyProfile | str | Path | None,
    config: ProfileConfig | None,
    save_profile: str | Path | None,
) -> _Profiles:
    # All that is needed was given, and once.
    require_use(data, rule, profile=profile, task_profile=task_profile)
    if ordinary_profile is not None and data.ordinary is not None:
        raise ConfigurationError(f"{OWNER}: give either ordinary_dataset or ordinary_profile")
    if ordinary_profile is not None and data.safety is None and profile is None:
        raise ConfigurationError(f"{OWNER}: ordinary_profile has no effect without safety_dataset or profile")
    reads_data = any(source is not None for source in (data.safety, data.ordinary, data.task))
    require_config_used(data, config, reads_data=reads_data, is_polished=False)
    if save_profile is not None and data.safety is None:
        why = "without safety_dataset" if profile is None else "beside a profile made before"
        raise ConfigurationError(f"{OWNER}: save_profile has no effect {why}")
    if rule.needs_task and data.task is None and task_profile is None:
        raise ConfigurationError(
            f"{OWNER}: {rule.name} weighs what the fine-tuning data uses; give task_dataset (--task-data FILE of "
            "examples) or task_profile, or leave out the rule"
        )
    found = _Profiles(
        None if profile is None else opened_profile(OWNER, profile),
        None if task_profile is None else opened_profile(OWNER, task_profile, "task_profile"),
        None if ordinary_profile is None else opened_profile(OWNER, ordinary_profile, "ordinary_profile"),
    )
    if found.safety is not None and found.ordinary is not None:
        found = found._replace(safety=with_ordinary(found.safety, found.ordinary, data.ordinary_weight), ordinary=None)
    if found.safety is not None and data.task is None:
        check_rule(rule, found.safety, found.task)
    return found


class _Reading(NamedTuple):
    """What is read with the base, or measured with the fine-tune."""

    saved: SavedTuned
    rule: Rule
    data: RunData
    config: ProfileConfig
    device: str
    progress: bool

    @property
    def sources(self) -> dict[str, Source]:
        """The data to read, by what it is."""
        named = {SAFETY_DATA: self.data.safety, ORDINARY_DATA: self.data.ordinary, TASK_DATA: self.data.task}
        return {name: source for name, source in named.items() if source is not None}

    def require_possible(self) -> None:
        """Stop before time is lost.

        Raises:
            ConfigurationError: The model does not fit in memory.
            DataError: There is too little data to measure by.
        """
        if self.rule.auto is not None and self.config.holdout is None:
            self.data.require_enough()
        if not (self.sources or self.rule.auto is not None) or self.saved.files is None:
            return
        number = "the strength as a number (--strength; what was found for another fine-tune of this base is a start)"
        cheap = "with which no model is loaded, and memory holds one layer"
        if self.sources:
            why = "read data with it"
            instead = (
                f"Collect profiles where it fits (safedelta profile), and give them (--profile, --task-profile) and "
                f"{number}, {cheap}"
            )
        else:
            why, instead = "measure a strength", f"Give {number}, {cheap}"
        require_memory(self.saved.files, self.device, why, instead)

    def profiles(
        self, given: _Profiles, processing_class: ProcessingClass | None, folder: Path | None
    ) -> tuple[PreTrainedModel | None, _Profiles]:
        """Collect what was not given.

        Args:
            given: What was.
            processing_class: Tokenizer or processor of the data; that of the base if None.
            folder: Where to keep the safety profile; None for nowhere.

        Returns:
            The base, where the fine-tune runs on it, and all profiles that are needed.
        """
        if not self.sources:
            return None, given
        what = f"base: {self.saved.base.base!r}"
        tokenizer = self._tokenizer(processing_class, what)
        for purpose, source in self.sources.items():  # what is small is read before what is large
            read_safety_data(source, tokenizer, self.config.max_length, purpose=purpose)
        base = load_base(self.saved.base, what, dtype=self.saved.dtype, device_map=self.device)
        found = self._collected(base, tokenizer, given)
        if folder is not None:
            assert found.safety is not None, "it was collected"
            found.safety.save(folder)
            found = found._replace(safety=SafetyProfile.load(folder))
        if self.saved.runs_on_base:
            return base, found
        del base
        gc.collect()  # hooks make cycles, and the fine-tune is loaded in its place
        return None, found

    def _tokenizer(self, given: ProcessingClass | None, what: str) -> ProcessingClass | None:
        if given is not None or all(map(_is_tokenised, self.sources.values())):
            return given
        return load_tokenizer(self.saved.base, what)

    def _collected(
        self, base: PreTrainedModel, processing_class: ProcessingClass | None, given: _Profiles
    ) -> _Profiles:
        model = open_model(base)
        digests = fingerprint(model)
        given.require_of(digests)
        collector = ProfileCollector(
            model=model,
            processing_class=processing_class,
            digests=digests,
            config=self.config,
            is_measured=self.rule.auto is not None,
            progress=self.progress,
        )
        safety = given.safety or collector.safety(self.data)
        if given.ordinary is not None:
            safety = with_ordinary(safety, given.ordinary, self.data.ordinary_weight)
        if self.data.task is None:
            return _Profiles(safety, given.task)
        try:
            return _Profiles(safety, collector.task(self.data, None, safety))
        except NothingLeftError as error:
            assert isinstance(error.sorting, TaskSorting), "it was raised by what sorts"
            return _Profiles(safety, None, nothing_left=error.sorting)


def _is_tokenised(source: Source) -> bool:
    rows = read_rows(source)
    return bool(rows) and is_tokenised(rows[0].row)
