"""Adjust a model in files that need not fit into memory, files to files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from safedelta_hf.adjust.loop import adjust_weights, report_of
from safedelta_hf.adjust.plan import require_number
from safedelta_hf.capture.without_data import digested
from safedelta_hf.checkpoint.folder import CheckpointFolder
from safedelta_hf.checkpoint.plan import CheckpointPlan, plan_checkpoint
from safedelta_hf.checkpoint.store import CheckpointStore
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import AdjustmentError, ConfigurationError, OutputError, SafeDeltaError, require_kind
from safedelta_hf.folders import unfinished_of
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import MergeRule, Rule, rule_of
from safedelta_hf.weights.digest import Identity, files_identity, profile_identity, source_identity


def adjust_checkpoint(
    *,
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    profile: SafetyProfile | str | Path | None = None,
    rule: Rule | str | None = None,
    task_profile: SafetyProfile | str | Path | None = None,
    treatment: Treatment | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Report:
    """Adjust a fine-tuned model in files, one weight at a time, and write it as it was saved: the same shards.

    Memory holds the matrices of one layer, whatever the size of the model. Configuration, tokenizer and what else
    belongs to the model are copied. A run that was stopped is taken up by the same call.

    Args:
        base: Folder or cached repository of the base, in safetensors.
        tuned: Folder of the fine-tuned model, in safetensors.
        output: Folder to write; must not exist.
        profile: Profile of the base, or the folder of one; None for a rule that needs no safety data, such as
            `Scale(strength=1.0)`.
        rule: Which part of each delta to keep, at a strength that is a number, so it has to be given: the default,
            `TaskRidge()` with `task_profile` and else `Ridge()`, is measured. A name stands for that rule as it is by
            default.
        task_profile: Profile of the same base on examples of the fine-tuning data, for rules that weigh them; or
            its folder.
        treatment: What to do with parameters other than linear weights.
        device: Where to compute.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        ConfigurationError: The strength is to be measured, the output lies in an input, or there is no such device.
        CheckpointError: The fine-tuned files are malformed, or not those of the profile's model; or the output exists,
            or is being written, or was begun otherwise.
        AdjustmentError: A file could not be read or written.
        SafeDeltaError: Named by parameter. Whatever was raised, there is no output; finished weights stay beside it
            for the next run.
    """
    place = _usable_device(device)
    require_number(rule_of("adjust_checkpoint", rule, task_profile))
    require_kind("adjust_checkpoint", "output", output, (str, Path), "a folder")
    with _failing_by_name(Path(output)):
        plan = plan_checkpoint(
            base=base,
            tuned=tuned,
            output=output,
            profile=profile,
            rule=rule,
            task_profile=task_profile,
            treatment=treatment,
        )
    return adjust_planned(plan, device=place, progress=progress)


def adjust_planned(plan: CheckpointPlan, *, device: torch.device | str = "cpu", progress: bool = True) -> Report:
    """Do with a model in files what was planned.

    Args:
        plan: From `plan_checkpoint`.
        device: Where to compute.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        ConfigurationError: The strength is no number, or there is no such device.
        CheckpointError: The output exists, or is being written, or was begun otherwise.
        AdjustmentError: A file could not be read or written.
        SafeDeltaError: Named by parameter. Whatever was raised, there is no output; finished weights stay beside it
            for the next run.
    """
    require_number(plan.rule)
    place = _usable_device(device)
    if not plan.profile.is_read:
        plan = replace(plan, profile=digested(plan.profile, plan.pair.base, progress=progress))
    header = plan.profile.header
    with (
        _failing_by_name(plan.output),
        CheckpointFolder(plan.output, plan.tuned, _manifest(plan, place), progress=progress) as folder,
    ):
        if not folder.is_complete:
            store, left = CheckpointStore(plan.pair, header, folder, place), plan.left(folder.finished.keys())
            adjust_weights(
                store, left, plan.profile, plan.rule, task=plan.task_profile, ranks=Ranks(), progress=progress
            )
            folder.complete(plan.copied, _report(plan, folder))
    return _report(plan, folder)


def _report(plan: CheckpointPlan, folder: CheckpointFolder) -> Report:
    records = (folder.record(name) for name in plan.names)
    architecture, task = plan.profile.header.architecture, plan.task_profile
    return report_of(records, plan.rule, plan.profile, task, architecture=architecture, base=plan.base.source)


@contextmanager
def _failing_by_name(output: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, SafeDeltaError) and not isinstance(error, OutputError):
            raise
        what = "a file could not be read or written" if isinstance(error, OSError) else type(error).__name__
        raise AdjustmentError(
            f"output: {str(output)!r} is not complete, {what} ({error}); what is finished stays in "
            f"{str(unfinished_of(output))!r}, and the same call goes on from there"
        ) from error


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(
            f"device={device!r} cannot be used here ({error}); give another, such as 'cpu'"
        ) from error


def _manifest(plan: CheckpointPlan, device: torch.device) -> dict[str, Any]:
    sources: Sequence[object] = plan.rule.sources if isinstance(plan.rule, MergeRule) else ()
    return {
        "rule": {"name": plan.rule.name, "settings": plan.rule.settings},
        "treatment": asdict(plan.treatment),
        "base": files_identity(plan.base),
        "tuned": files_identity(plan.tuned),
        "profile": _identity(plan.profile),
        "task": None if plan.task_profile is None else _identity(plan.task_profile),
        "further models": [source_identity(source) for source in sources],
        "device": str(device),
        "version of safedelta-hf": version("safedelta-hf"),
        "version of torch": torch.__version__,
    }


def _identity(profile: SafetyProfile) -> Identity:
    return profile_identity(profile.header, profile.uses, profile.moments.identity())
