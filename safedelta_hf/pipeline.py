"""Profile, plan, apply: the way from safety data to adjusted weights, and the only loop over parameters."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.collect import capture_moments
from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.capture.safety_data import ProcessingClass, digest_of, read_safety_data, tokenizer_digest
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.core.transform import Dense
from safedelta_hf.errors import BaseWeightsError, CoverageError, NumericalError, ProfileError, SafeDeltaError
from safedelta_hf.names import parameter_aliases, parameter_names
from safedelta_hf.records import Action, ParameterRecord, Plan, PlanEntry, RuleRecord, Treatment, Use
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, SafeDelta
from safedelta_hf.rules.rule import State
from safedelta_hf.weights.base import BaseWeights, open_base, verified
from safedelta_hf.weights.delta import MatrixDelta, recombine
from safedelta_hf.weights.fingerprint import data_types, digest, fingerprint
from safedelta_hf.weights.journal import Journal


def collect_profile(
    model: nn.Module,
    safety_dataset: str | Path | Iterable[Mapping[str, Any]],
    processing_class: ProcessingClass | None = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    moment_memory: int | str | None = None,
    offload_folder: str | Path | None = None,
    share_moments: bool = True,
    progress: bool = True,
) -> SafetyProfile:
    """Let the base model read the safety data, and keep the second moments of every layer's inputs.

    Args:
        model: The base (aligned) model; it is left as it was.
        safety_dataset: Harmful prompts with the responses of a safe model: a Dataset, a list of dicts, or the path of
            a JSON-lines file, in any form that TRL takes.
        processing_class: Tokenizer or processor; not needed for tokenised data.
        batch_size: Sequences per forward pass, at most; batches hold sequences of one length and no padding.
        max_length: Sequences are cut to this many tokens.
        moment_memory: Bytes (or "8GB") of moments to hold on the device at a time; None for no limit.
        offload_folder: Where moments beyond that limit are memory-mapped; without it they go to host memory.
        share_moments: Whether layers that read the same tensor share one moment.
        progress: Whether to show a progress bar.

    Returns:
        The profile, with its moments in host memory or mapped from the offload folder.

    Raises:
        DataError: The safety data is empty, has no responses, or does not fit the model.
        CaptureError: The model has no linear layer.
        NumericalError: Weights or activations hold NaN or Inf.
    """  # noqa: DOC502 - raised by the rooms below
    sequences = read_safety_data(safety_dataset, processing_class, max_length)
    budget = None if moment_memory is None else convert_file_size_to_int(moment_memory)
    capture = capture_moments(
        model,
        sequences,
        storage=MomentStorage(budget, offload_folder),
        batch_size=batch_size,
        share_moments=share_moments,
        progress=progress,
    )
    return SafetyProfile.of(
        capture,
        architecture=type(model).__name__,
        base=fingerprint(model),
        dtypes=data_types(model),
        tokenizer=tokenizer_digest(processing_class),
        data=digest_of(sequences),
        sequences=len(sequences),
        tokens=sum(len(sequence.input_ids) for sequence in sequences),
    )


def plan_model(model: nn.Module, profile: SafetyProfile, treatment: Treatment) -> Plan:
    """Decide what happens to each parameter, from names and shapes alone.

    Args:
        model: The model that will be adjusted, or any other of its architecture.
        profile: Profile of its base.
        treatment: What to do with parameters other than linear weights.

    Returns:
        One entry for each parameter; those that read the same moment stand together.

    Raises:
        ProfileError: The profile was made for another architecture.
    """
    shapes = {name: tuple(parameter.shape) for parameter, name in parameter_names(model).items()}
    if set(shapes) != set(profile.header.base):
        strangers = sorted(set(shapes) ^ set(profile.header.base))
        raise ProfileError(
            f"profile: made for {profile.header.architecture} with {len(profile.header.base)} parameters, this is "
            f"{type(model).__name__} with {len(shapes)}; they differ in {', '.join(strangers[:3])}. "
            "Collect a profile of this model's base"
        )
    aliases = parameter_aliases(model)
    uses: dict[str, list[Use]] = {}
    for use in profile.uses:
        uses.setdefault(use.parameter, []).append(use)
    order = {key: number for number, key in enumerate(profile.moments)}
    entries = [
        _plan_entry(name, shapes[name], uses.get(name, []), profile, treatment, aliases[name]) for name in shapes
    ]
    entries.sort(key=lambda entry: order[entry.uses[-1].moment] if entry.uses else len(order))
    return Plan(entries=tuple(entries))


def _plan_entry(
    name: str,
    shape: tuple[int, ...],
    uses: Sequence[Use],
    profile: SafetyProfile,
    treatment: Treatment,
    aliases: tuple[str, ...],
) -> PlanEntry:
    if not uses:
        action = None if treatment.uncovered == "error" else Action(treatment.uncovered)
        reason = profile.header.skipped.get(name, "no supported layer uses it")
        return PlanEntry(parameter=name, shape=shape, action=action, reason=reason, aliases=aliases)
    actions = {use: treatment.of(use.role) for use in uses}
    action = next(action for action in (Action.RESET, Action.ADJUST, Action.KEEP) if action in actions.values())
    if action is not Action.ADJUST:
        roles = " and ".join(use.role for use in uses)
        return PlanEntry(
            parameter=name, shape=shape, action=action, reason=f"the setting for {roles} is {action}", aliases=aliases
        )
    adjusted = tuple(use for use in uses if actions[use] is Action.ADJUST)
    return PlanEntry(parameter=name, shape=shape, action=action, uses=adjusted, aliases=aliases)


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
                records.append(_unchanged(entry))
                continue
            try:
                record, value = adjuster.adjust(entry, parameters[entry.parameter].detach())
            except SafeDeltaError as error:
                raise error.at(entry.parameter) from error
            if value is not None:
                journal.replace(parameters[entry.parameter], value)
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
        _check_moments(entry, profile.moments)
    require_decisions(undecided)
    return changed


def require_decisions(entries: Sequence[PlanEntry]) -> None:
    """Stop where a trained parameter cannot be covered and nobody said what to do with it.

    Args:
        entries: Plan entries of trained parameters.

    Raises:
        CoverageError: One of them has no action.
    """
    undecided = [entry for entry in entries if entry.action is None]
    if undecided:
        listed = "\n".join(f"  {entry.parameter}: {entry.reason}" for entry in undecided[:20])
        more = f"\n  ... and {len(undecided) - 20} more" if len(undecided) > 20 else ""
        raise CoverageError(
            f"{len(undecided)} trained parameters cannot be covered:\n{listed}{more}\n"
            "Pass treatment=Treatment(uncovered='reset') to put them back to the base, or 'keep' to leave them as tuned"
        )


def _check_moments(entry: PlanEntry, moments: Mapping[str, InputMoment]) -> None:
    for use in entry.uses:
        columns = MatrixDelta(torch.empty(entry.shape, device="meta"), use.role).columns
        found = tuple(moments[use.moment].total.shape)
        if found[-1:] != (columns,):
            raise ProfileError(
                f"{entry.parameter}: has {columns} inputs, its moment in the profile has the shape {list(found)}; "
                "the profile was made for another model"
            )


def _unchanged(entry: PlanEntry) -> ParameterRecord:
    return ParameterRecord(
        parameter=entry.parameter,
        shape=entry.shape,
        outcome="unchanged",
        reason="the fine-tuning did not move it",
        roles=tuple(use.role for use in entry.uses),
        aliases=entry.aliases,
    )


class _Adjuster:
    """Adjusts one parameter at a time; what the rule made of its Hessians serves the next if that shares them."""

    def __init__(self, base: BaseWeights, profile: SafetyProfile, rule: Rule) -> None:
        self._base = base
        self._profile = profile
        self._rule = rule
        self._prepared: dict[str, tuple[Tensor, State]] = {}

    def adjust(self, entry: PlanEntry, tuned: Tensor) -> tuple[ParameterRecord, Tensor | None]:
        """What becomes of a parameter.

        Args:
            entry: Its plan.
            tuned: Its fine-tuned value; not changed.

        Returns:
            The record, and the value to write, or None if it stays as tuned.
        """
        base = self._base.read(entry.parameter).to(tuned)
        delta = tuned.to(torch.float32) - base.to(torch.float32)
        energy = float(delta.square().sum())
        if entry.action is not Action.ADJUST:
            keeps = entry.action is Action.KEEP
            record = _record(
                entry, outcome="kept" if keeps else "reset", delta_energy=energy, lost_energy=0.0 if keeps else energy
            )
            return record, None if keeps else base
        self._prepare(entry, delta.device)
        adjusted, notes = delta, list[str]()
        for use in entry.uses:
            _, state = self._prepared[use.moment]
            view = MatrixDelta(adjusted, use.role)
            adjusted = view.transformed(self._rule.transform(state, view))
            notes.extend(state.notes)
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
            0.5 * MatrixDelta(delta, use.role).inner(Dense(matrix=self._prepared[use.moment][0])) for use in entry.uses
        )

    def _prepare(self, entry: PlanEntry, device: torch.device) -> None:
        """Hold the Hessians that this parameter needs, and no others."""
        needed = {use.moment for use in entry.uses}
        self._prepared = {
            key: pair for key, pair in self._prepared.items() if key in needed and pair[0].device == device
        }
        for key in needed - set(self._prepared):
            hessian = self._profile.moments[key].hessian(device)
            self._prepared[key] = (hessian, self._rule.prepare(hessian))


def _record(entry: PlanEntry, **values: Any) -> ParameterRecord:  # noqa: ANN401
    return ParameterRecord(
        parameter=entry.parameter,
        shape=entry.shape,
        reason=entry.reason,
        roles=tuple(use.role for use in entry.uses),
        aliases=entry.aliases,
        **values,
    )
