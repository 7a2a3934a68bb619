"""What will happen to a model in files, decided from headers before any tensor is read or anything is written."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table

from safedelta_hf.adjust.plan import check_rule, plan_parameters
from safedelta_hf.adjust.settings import opened_settings
from safedelta_hf.capture.without_data import base_without_data
from safedelta_hf.checkpoint.folder import require_absent
from safedelta_hf.checkpoint.lineage import require_order
from safedelta_hf.checkpoint.other_files import other_files
from safedelta_hf.checkpoint.pair import CheckpointPair
from safedelta_hf.deltas.lora_settings import CONFIG_FILE
from safedelta_hf.errors import BaseWeightsError, CheckpointError, ConfigurationError, require_kind
from safedelta_hf.folders import unfinished_of
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Plan, PlanEntry, Treatment
from safedelta_hf.report.printing import PARAMETER, Foldable, printed
from safedelta_hf.rules import Rule
from safedelta_hf.weights.safetensors_files import SafetensorsFiles


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """What will be done with a model in files.

    Attributes:
        base: Files of the base.
        tuned: Files of the fine-tuned model.
        output: Folder that will be written.
        profile: Profile of the base; where no data was read, its digests are empty before the weights are.
        rule: Which part of each delta will be kept.
        task_profile: Profile of the base on examples of the fine-tuning data, for rules that weigh them.
        treatment: What will be done with parameters other than linear weights.
        pair: The weights, matched with the profile.
        entries: What happens to each parameter if the fine-tuning moved it; those that read one moment stand together.
        copied: Files beside the weights that belong to the model.
        left_out: Files and folders there that do not.
    """

    base: SafetensorsFiles
    tuned: SafetensorsFiles
    output: Path
    profile: SafetyProfile
    rule: Rule
    task_profile: SafetyProfile | None
    treatment: Treatment
    pair: CheckpointPair
    entries: tuple[PlanEntry, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all parameters, and of the tensors that are none, in the order of the report."""
        return (*(entry.parameter for entry in self.entries), *self.pair.others)

    def left(self, finished: Collection[str]) -> Plan:
        """What is left to do.

        Args:
            finished: Names of the parameters that are finished.

        Returns:
            The entries of the others.
        """
        return Plan(entries=tuple(entry for entry in self.entries if entry.parameter not in finished))

    @property
    def is_begun(self) -> bool:
        """Whether an earlier run was stopped and left what it had finished."""
        return unfinished_of(self.output).exists()

    def table(self) -> str:
        """The plan as a table within the width of the terminal, or as wide as it needs where there is none.

        Returns:
            Text with one row for each tensor, and the files below.
        """
        names = ("parameter", "shape", "type", "role", "if tuned", "reason")
        table = Table(*(Column(name, overflow="fold") for name in names), title=f"Plan for {self.tuned.source}")
        for entry in self.entries:
            roles = "+".join(use.role for use in entry.uses)
            action = "error" if entry.action is None else str(entry.action)
            stored = self.pair.stored[entry.parameter]
            told = _described(entry.parameter, stored.shape, self.tuned.tensors[stored.names[0]].dtype)
            table.add_row(Foldable(told[0], PARAMETER), *told[1:], roles, action, entry.reason)
        for name, tensor in self.pair.others.items():
            told = _described(name, tensor.shape, tensor.dtype)
            table.add_row(Foldable(told[0], PARAMETER), *told[1:], "", "keep", "no parameter of the profile's model")
        return printed(table) + "".join(f"{line}\n" for line in self._files())

    def _files(self) -> list[str]:
        size = sum(path.stat().st_size for path in self.tuned.paths.values())
        return [
            f"Base: {self.base.source}, {len(self.base.paths)} file(s)",
            f"Weights: {len(self.entries)} parameters in {len(self.tuned.paths)} file(s), {size:,} bytes",
            f"Copied: {', '.join(self.copied) or 'nothing'}",
            f"Left out: {', '.join(self.left_out) or 'nothing'}",
            f"Output: {self.output}" + (", begun by an earlier run" if self.is_begun else ""),
        ]


def _described(name: str, shape: tuple[int, ...], dtype: str) -> tuple[str, str, str]:
    return name, "x".join(map(str, shape)), dtype


def plan_checkpoint(
    *,
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    profile: SafetyProfile | str | Path | None = None,
    rule: Rule | str | None = None,
    task_profile: SafetyProfile | str | Path | None = None,
    treatment: Treatment | None = None,
) -> CheckpointPlan:
    """Check a model in files against its base and a profile, and decide what happens to each parameter.

    No tensor is read and nothing is written.

    Args:
        base: Folder or cached repository of the base.
        tuned: Folder of the fine-tuned model.
        output: Folder that will be written.
        profile: Profile of the base, or the folder of one; None for a rule that needs no safety data, such as
            `Scale(strength=1.0)`.
        rule: Which part of each delta to keep, or the name of a rule; `TaskRidge()` with `task_profile`, else
            `Ridge()`, if None.
        task_profile: Profile of the same base on examples of the fine-tuning data; or its folder.
        treatment: What to do with parameters other than linear weights.

    Returns:
        The plan.

    Raises:
        ConfigurationError: The output lies in an input.
        CheckpointError: The fine-tuned files are malformed, or not those of the profile's model; or the output exists.
        BaseWeightsError: The files of the base are malformed, or not those of the profile's model.
        ProfileError: The profile is malformed.
    """
    for name, value in (("base", base), ("tuned", tuned), ("output", output)):
        require_kind("adjust_checkpoint", name, value, (str, Path), "a folder")
    output = Path(output)
    require_apart(output, base, tuned, profile, task_profile)
    require_absent(output)
    settings = opened_settings(
        "adjust_checkpoint",
        profile,
        rule,
        task_profile,
        treatment,
        without_data=lambda: base_without_data(open_base_files(base))[0],
    )
    require_order(base, tuned)
    check_rule(settings.rule, settings.profile, settings.task)
    tuned_files, base_files = open_tuned_files(Path(tuned)), open_base_files(base)
    pair = CheckpointPair(base_files, tuned_files, settings.profile.header)
    index = [] if tuned_files.index is None else [tuned_files.index.name]
    copied, left_out = other_files(Path(tuned), frozenset([*tuned_files.paths, *index]))
    return CheckpointPlan(
        base=base_files,
        tuned=tuned_files,
        output=output,
        profile=settings.profile,
        rule=settings.rule,
        task_profile=settings.task,
        treatment=settings.treatment,
        pair=pair,
        entries=plan_parameters(pair.shapes, settings.profile, settings.treatment, pair.aliases).entries,
        copied=copied,
        left_out=left_out,
    )


def open_base_files(source: str | Path) -> SafetensorsFiles:
    """Open the weights of a base.

    Args:
        source: Folder or cached repository.

    Returns:
        Its files, of which headers were read.

    Raises:
        BaseWeightsError: They are missing or malformed.
    """
    try:
        return SafetensorsFiles(source)
    except CheckpointError as error:
        raise BaseWeightsError(f"base: {error}") from error


def open_tuned_files(folder: Path) -> SafetensorsFiles:
    """Open the weights of a fine-tuned model.

    Args:
        folder: Its folder.

    Returns:
        Its files, of which headers were read.

    Raises:
        CheckpointError: They are missing or malformed, or those of an adapter.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"tuned: {str(folder)!r} is no folder; give that of the fine-tuned model, and the aligned model as base"
        )
    try:
        return SafetensorsFiles(folder)
    except CheckpointError as error:
        hint = ""
        if (folder / CONFIG_FILE).is_file():
            hint = ". It is the folder of an adapter: use adjust_adapter_files (--adapter on the command line)"
        raise CheckpointError(f"tuned: {error}{hint}") from error


def require_apart(output: Path, *inputs: SafetyProfile | str | Path | None) -> None:
    """Make sure that nothing is written into what is only read.

    Args:
        output: The folder to write.
        *inputs: What is read; only folders are looked at.

    Raises:
        ConfigurationError: The output lies in one of them.
    """
    for source in inputs:
        if isinstance(source, str | Path) and output.resolve().is_relative_to(Path(source).resolve()):
            raise ConfigurationError(
                f"output: {str(output)!r} lies in {str(source)!r}, which is only read; choose another folder"
            )
