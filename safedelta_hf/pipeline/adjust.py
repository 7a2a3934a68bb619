"""The only loop over parameters: check all, then adjust all of them or none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.core.loss import quadratic_loss
from safedelta_hf.errors import BaseWeightsError, NumericalError, SafeDeltaError
from safedelta_hf.names import parameter_names
from safedelta_hf.pipeline.plan import check_moments, plan_model, require_decisions
from safedelta_hf.pipeline.prepared import PreparedMoments
from safedelta_hf.records import Action, ParameterRecord, Plan, PlanEntry, RuleRecord, Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, SafeDelta
from safedelta_hf.weights.base import BaseWeights, open_base, verified
from safedelta_hf.weights.delta import MatrixDelta, recombine
from safedelta_hf.weights.fingerprint import digest
from safedelta_hf.weights.journal import Journal


def adjust_model(
    model: nn.Module,
    *,
    base: nn.Module | str | Path | BaseWeights,
    profile: SafetyProfile,
    rule: Rule | None = None,
    treatment: Treatment | None = None,
    workspace: Path | None = None,
    progress: bool = True,
) -> Report:
    """Adjust a fine-tuned model in place: all of it, or, if anything fails, nothing of it.

    Args:
        model: The fine-tuned model, held whole by this process.
        base: The base model, a folder or cached repository of its safetensors files, or an open reader.
        profile: Profile of that base.
        rule: Which part of each delta to keep; `SafeDelta()` if None.
        treatment: What to do with parameters other than linear weights.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """
    rule = rule or SafeDelta()
    reader = open_base(base, model) if isinstance(base, nn.Module | str | Path) else base
    plan = plan_model(model, profile, treatment or Treatment())
    parameters = {name: parameter for parameter, name in parameter_names(model).items()}
    changed = _inspect(plan, parameters, reader, profile, progress=progress)
    adjuster = _Adjuster(reader, profile, rule)
    records = []
    with Journal(workspace) as journal:
        for entry in tqdm(plan.entries, desc=f"Adjusting ({rule.name})", unit="weight", disable=not progress):
            if entry.parameter not in changed:
                records.append(_record(entry, outcome="unchanged", reason="the fine-tuning did not move it"))
                continue
            try:
                record, value = adjuster.adjust(entry, parameters[entry.parameter].detach())
            except SafeDeltaError as error:
                raise error.at(entry.parameter) from error
            if value is not None:
                journal.replace(entry.parameter, parameters[entry.parameter], value)
            records.append(record)
    return Report(
        rule=RuleRecord(name=rule.name, settings=rule.settings),
        architecture=type(model).__name__,
        base=reader.source,
        sequences=profile.header.sequences,
        tokens=profile.header.tokens,
        parameters=tuple(records),
    )


def _inspect(
    plan: Plan, parameters: Mapping[str, nn.Parameter], base: BaseWeights, profile: SafetyProfile, *, progress: bool
) -> set[str]:
    """Check everything that can be checked before a weight is touched.

    Args:
        plan: What will be done.
        parameters: Fine-tuned parameters by name.
        base: Where the base weights are read.
        profile: Profile of that base.
        progress: Whether to show a progress bar.

    Returns:
        Names of the parameters that the fine-tuning changed.

    Raises:
        BaseWeightsError: A base weight is missing, of another shape, or not the profile's.
        NumericalError: A fine-tuned weight holds NaN or Inf.
    """
    changed = set()
    undecided = []
    for entry in tqdm(plan.entries, desc="Checking weights", unit="weight", disable=not progress):
        name, parameter = entry.parameter, parameters[entry.parameter]
        dtype, expected = profile.header.dtypes[name], profile.header.base[name]
        if digest(parameter) == expected:
            continue
        weight = verified(base, name, dtype, expected)
        if torch.equal(parameter.cpu(), weight.to("cpu", parameter.dtype)):
            continue  # the same weight, in another dtype than when the profile was made
        if weight.shape != parameter.shape:
            raise BaseWeightsError(
                f"{name}: {list(parameter.shape)} in the model, {list(weight.shape)} in the base; was the vocabulary "
                "resized after the profile was made?"
            )
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"{name}: the fine-tuned weight holds NaN or Inf; the training has diverged")
        changed.add(name)
        if entry.action is None:
            undecided.append(entry)
        check_moments(entry, profile.moments)
    require_decisions(undecided)
    return changed


class _Adjuster:
    """Adjusts one parameter at a time."""

    def __init__(self, base: BaseWeights, profile: SafetyProfile, rule: Rule) -> None:
        self._base = base
        self._profile = profile
        self._rule = rule
        self._prepared = PreparedMoments(profile, rule)

    def adjust(self, entry: PlanEntry, tuned: Tensor) -> tuple[ParameterRecord, Tensor | None]:
        """What becomes of a parameter.

        Args:
            entry: Its plan.
            tuned: Its fine-tuned value; not changed.

        Returns:
            The record, and the value to write, or None if it stays as tuned.
        """
        dtype = getattr(torch, self._profile.header.dtypes[entry.parameter])
        base = self._base.read(entry.parameter).to(dtype).to(tuned)
        delta = tuned.to(torch.float32) - base.to(torch.float32)
        energy = float(delta.square().sum())
        if entry.action is not Action.ADJUST:
            keeps = entry.action is Action.KEEP
            record = _record(
                entry, outcome="kept" if keeps else "reset", delta_energy=energy, lost_energy=0.0 if keeps else energy
            )
            return record, None if keeps else base
        self._prepared.hold(entry.uses, delta.device)
        adjusted, notes = delta, list[str]()
        for use in entry.uses:
            state = self._prepared.state(use)
            view = MatrixDelta(adjusted, use.role)
            transform = self._rule.transform(state, view)
            adjusted = view.transformed(transform)
            notes.extend(state.notes + transform.notes)
        record = _record(
            entry,
            outcome="adjusted",
            delta_energy=energy,
            lost_energy=float((delta - adjusted).square().sum()),
            tuned_loss=self._loss(entry, delta),
            adjusted_loss=self._loss(entry, adjusted),
            notes=tuple(notes),
        )
        return record, recombine(tuned, base, delta, adjusted)

    def _loss(self, entry: PlanEntry, delta: Tensor) -> float:
        return sum(
            quadratic_loss(MatrixDelta(delta, use.role).inner, self._prepared.hessian(use)) for use in entry.uses
        )


def _record(entry: PlanEntry, **values: Any) -> ParameterRecord:  # noqa: ANN401
    described = {
        "parameter": entry.parameter,
        "shape": entry.shape,
        "reason": entry.reason,
        "roles": tuple(use.role for use in entry.uses),
        "aliases": entry.aliases,
    }
    return ParameterRecord(**described | values)
