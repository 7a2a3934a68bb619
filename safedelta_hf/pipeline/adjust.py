"""The only loop over parameters: check all, then adjust all of them or none."""

from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.core.loss import quadratic_loss
from safedelta_hf.errors import SafeDeltaError
from safedelta_hf.pipeline.plan import check_moments, plan_model, require_decisions
from safedelta_hf.pipeline.prepared import PreparedMoments
from safedelta_hf.records import Action, ParameterRecord, Plan, PlanEntry, RuleRecord, Treatment, Use
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, SafeDelta
from safedelta_hf.weights.base import BaseWeights, open_base
from safedelta_hf.weights.delta import Delta
from safedelta_hf.weights.model import ModelStore
from safedelta_hf.weights.store import WeightStore


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
    """  # noqa: DOC502 - raised by the functions called
    reader = open_base(base, model) if isinstance(base, nn.Module | str | Path) else base
    plan = plan_model(model, profile, treatment or Treatment())
    store = ModelStore(model, reader, profile.header, workspace)
    return adjust_weights(store, plan, profile, rule or SafeDelta(), progress=progress)


def adjust_weights(
    store: WeightStore, plan: Plan, profile: SafetyProfile, rule: Rule, *, progress: bool = True
) -> Report:
    """Adjust fine-tuned weights wherever they are kept: all of them, or, if anything fails, none.

    Args:
        store: The weights.
        plan: What will be done with each parameter of the store.
        profile: Profile of their base.
        rule: Which part of each delta to keep.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """
    tuned = _inspect(plan, store, profile, progress=progress)
    adjuster = _Adjuster(store, profile, rule)
    records = []
    with store:
        for entry in tqdm(plan.entries, desc=f"Adjusting ({rule.name})", unit="weight", disable=not progress):
            if entry.parameter not in tuned:
                records.append(_record(entry, outcome="unchanged", reason="the fine-tuning did not move it"))
                continue
            try:
                records.append(adjuster.adjust(entry))
            except SafeDeltaError as error:
                raise error.at(entry.parameter) from error
    return Report(
        rule=RuleRecord(name=rule.name, settings=rule.settings),
        architecture=store.architecture,
        base=store.source,
        sequences=profile.header.sequences,
        tokens=profile.header.tokens,
        parameters=tuple(records),
    )


def _inspect(plan: Plan, store: WeightStore, profile: SafetyProfile, *, progress: bool) -> set[str]:
    """Check everything that can be checked before a weight is touched.

    Args:
        plan: What will be done.
        store: The fine-tuned weights.
        profile: Profile of their base.
        progress: Whether to show a progress bar.

    Returns:
        Names of the parameters that the fine-tuning changed.
    """
    tuned = [
        entry
        for entry in tqdm(plan.entries, desc="Checking weights", unit="weight", disable=not progress)
        if store.is_tuned(entry.parameter)
    ]
    for entry in tuned:
        check_moments(entry, profile.moments)
    require_decisions(tuned)
    return {entry.parameter for entry in tuned}


class _Adjuster:
    """Adjusts one parameter at a time."""

    def __init__(self, store: WeightStore, profile: SafetyProfile, rule: Rule) -> None:
        self._store = store
        self._rule = rule
        self._prepared = PreparedMoments(profile, rule)

    def adjust(self, entry: PlanEntry) -> ParameterRecord:
        """Do with a parameter what its plan says.

        Args:
            entry: Its plan.

        Returns:
            The record.
        """
        delta = self._store.delta(entry.parameter)
        if entry.action is Action.KEEP:
            return _record(entry, outcome="kept", delta_energy=delta.tuned_energy)
        if entry.action is not Action.ADJUST:
            return self._write(entry, delta.dropped(), outcome="reset")
        adjusted, remarks = delta, list[str]()
        for use in entry.uses:
            self._hold(entry, use, delta)
            state = self._prepared.state(use)
            transform = self._rule.transform(state, adjusted.matrix(use))
            adjusted = adjusted.transformed(use, transform)
            remarks.extend(state.notes + transform.notes)
        return self._write(
            entry,
            adjusted,
            outcome="adjusted",
            tuned_loss=self._loss(entry, delta),
            adjusted_loss=self._loss(entry, adjusted),
            notes=tuple(remarks),
        )

    def _write(self, entry: PlanEntry, delta: Delta, *, notes: tuple[str, ...] = (), **values: Any) -> ParameterRecord:  # noqa: ANN401
        # Measured before it is written: a delta may look at the very weight that is overwritten.
        energies = {"delta_energy": delta.tuned_energy, "lost_energy": delta.lost_energy}
        notes += self._store.write(entry.parameter, delta)
        return _record(entry, **values, **energies, notes=notes)

    def _loss(self, entry: PlanEntry, delta: Delta) -> float:
        total = 0.0
        for use in entry.uses:
            self._hold(entry, use, delta)
            total += quadratic_loss(delta.matrix(use).inner, self._prepared.hessian(use))
        return total

    def _hold(self, entry: PlanEntry, use: Use, delta: Delta) -> None:
        # Of a parameter with many parts, such as experts, one Hessian at a time.
        self._prepared.hold(entry.uses if use.part is None else (use,), delta.device)


def _record(entry: PlanEntry, **values: Any) -> ParameterRecord:  # noqa: ANN401
    described = {
        "parameter": entry.parameter,
        "shape": entry.shape,
        "reason": entry.reason,
        "roles": tuple(use.role for use in entry.uses),
        "aliases": entry.aliases,
    }
    return ParameterRecord(**described | values)
