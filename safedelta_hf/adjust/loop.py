"""The only loop over parameters: check all, then adjust all of them or none."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from tqdm.auto import tqdm

from safedelta_hf.adjust.factors import FactorCache
from safedelta_hf.adjust.merging import Merging, require_dense
from safedelta_hf.adjust.plan import check_moments, require_decisions
from safedelta_hf.adjust.search import search_strength
from safedelta_hf.adjust.store import WeightStore
from safedelta_hf.core.curvature import quadratic_loss
from safedelta_hf.data.refusals import Drift, HeldOut
from safedelta_hf.deltas.dense import Delta
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError, ProfileError, SafeDeltaError, SafeDeltaWarning
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records import Action, ParameterRecord, Plan, PlanEntry, RuleRecord, StrengthSearch, Use
from safedelta_hf.report import Report
from safedelta_hf.rules import AutoStrength, MergeRule, Rule, TransformRule

REUSED_BYTES = 2 << 30
"""Moments that a search holds, with what the rule made of them, from one strength to the next."""


class Adjustment:
    """Everything that an adjustment needs, checked before a weight is touched.

    Args:
        store: The fine-tuned weights; writing happens inside its block, which the caller opens.
        plan: What will be done with each parameter of the store.
        profile: Profile of their base.
        rule: Which part of each delta will be kept, at whatever strength.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        ranks: The processes of the run, each of which goes through this with its part of the weights.
        progress: Whether to show progress bars.

    Raises:
        SafeDeltaError: Something that the plan needs is missing or malformed; named by parameter.
    """  # noqa: DOC502 - raised by the functions called

    def __init__(
        self,
        store: WeightStore,
        plan: Plan,
        profile: SafetyProfile,
        rule: Rule,
        task: SafetyProfile | None,
        *,
        ranks: Ranks,
        progress: bool,
    ) -> None:
        self._store, self._plan, self._profile, self._task = store, plan, profile, task
        self._ranks, self._progress = ranks, progress and ranks.is_main
        self._merging = Merging(rule, plan.entries, profile) if isinstance(rule, MergeRule) else None
        tuned = [
            entry
            for entry in tqdm(plan.entries, desc="Checking weights", unit="weight", disable=not self._progress)
            if store.is_tuned(entry.parameter)
        ]
        for entry in tuned:
            check_moments(entry, profile.moments)
            if self._merging is not None:
                require_dense(rule, entry, is_dense=store.is_dense(entry.parameter))
                self._merging.check(entry)
        require_decisions(tuned)
        self._tuned = {entry.parameter for entry in tuned}

    def at(
        self,
        rule: Rule,
        prepared: FactorCache | None = None,
        keep: Callable[[ParameterRecord], None] = lambda record: None,
    ) -> tuple[ParameterRecord, ...]:
        """Adjust every parameter.

        Args:
            rule: Which part of each delta to keep, at a strength that is a number.
            prepared: What was prepared for the same rule before, at whatever strength.
            keep: Told of each parameter that is finished, adjusted or not.

        Returns:
            What was done to each parameter.

        Raises:
            SafeDeltaError: Named by parameter.
        """
        prepared = prepared or self._prepared_for(rule)
        adjuster = _Adjuster(self._store, rule, prepared, self._merging)
        records = []
        description = f"Adjusting ({rule.name})"
        for entry in tqdm(self._plan.entries, desc=description, unit="weight", disable=not self._progress):
            if entry.parameter in self._tuned:
                try:
                    record = adjuster.adjust(entry)
                except SafeDeltaError as error:
                    raise error.at(entry.parameter) from error
            else:
                record = _record(entry, outcome="unchanged", reason="the fine-tuning did not move it")
            keep(record)
            records.append(record)
        return tuple(records)

    def measured(self, rule: Rule, auto: AutoStrength) -> tuple[StrengthSearch, tuple[ParameterRecord, ...]]:
        """Adjust every parameter at the mildest strength that measured refusals allow.

        Args:
            rule: Which part of each delta to keep.
            auto: What is allowed.

        Returns:
            How the strength was found, and what was done to each parameter.
        """
        running, held_out = _measurable(rule, self._store.running, self._profile)
        prepared = self._prepared_for(rule, memory=REUSED_BYTES) if rule.factors_serve_any_strength else None
        records: dict[float, tuple[ParameterRecord, ...]] = {}

        def apply(strength: float) -> None:
            self._store.restore()
            records.clear()
            records[strength] = self.at(rule.at(strength), prepared)

        self._put_base()
        base, noise = held_out.read_again(running, quantile=auto.quantile)

        def measure(strength: float) -> Drift:
            apply(strength)
            return base.drift(running, quantile=auto.quantile)

        search = replace(search_strength(rule, auto, measure, len(held_out.sequences)), noise=noise)
        if search.warning and self._ranks.is_main:
            warnings.warn(f"{rule.name}: {search.warning}", SafeDeltaWarning, stacklevel=4)
        if search.strength not in records:
            apply(search.strength)
        return search, records[search.strength]

    def _put_base(self) -> None:
        for name in (entry.parameter for entry in self._plan.entries if entry.parameter in self._tuned):
            self._store.write(name, self._store.delta(name).zero())

    def _prepared_for(self, rule: Rule, memory: int = 0) -> FactorCache:
        uses = (use for entry in self._plan.entries if entry.parameter in self._tuned for use in entry.uses)
        return FactorCache(self._profile, rule, self._task, uses=uses, ranks=self._ranks, memory=memory)


def require_measurable(rule: Rule, profile: SafetyProfile) -> None:
    """Stop where a strength is to be measured and there is nothing to measure it by.

    Args:
        rule: The rule.
        profile: Profile of the base.

    Raises:
        ProfileError: No safety data was held out.
    """
    if rule.auto is not None and profile.held_out is None:
        raise ProfileError(
            f"{rule.name}: strength='auto' measures refusals on safety data that no moment has seen, and none of the "
            f"{profile.header.sequences} examples of this profile was held out; collect it with holdout=0.25 (of at "
            "least 16 examples by default), or give the strength as a number"
        )


def require_number(rule: Rule) -> None:
    """Stop where a strength is to be measured and no model runs with the weights.

    Args:
        rule: The rule.

    Raises:
        ConfigurationError: Its strength is no number.
    """
    if rule.auto is not None:
        raise ConfigurationError(
            f"{rule.name}: strength='auto' measures a model in memory, and there is none here; give a number: "
            f"rule={type(rule).__name__}(strength=...) (--strength on the command line), such as the one that "
            "adjust_model or adjust_adapter reports for a model of this family"
        )


def _measurable(rule: Rule, running: ShardedModel | None, profile: SafetyProfile) -> tuple[ShardedModel, HeldOut]:
    if running is None:
        require_number(rule)
    require_measurable(rule, profile)
    assert running is not None
    assert profile.held_out is not None
    return running, profile.held_out


class _Adjuster:
    """Adjusts one parameter at a time."""

    def __init__(self, store: WeightStore, rule: Rule, prepared: FactorCache, merging: Merging | None) -> None:
        self._store = store
        self._rule = rule
        self._prepared = prepared
        self._merging = merging

    def adjust(self, entry: PlanEntry) -> ParameterRecord:
        """Do with a parameter what its plan says.

        Args:
            entry: Its plan.

        Returns:
            The record.
        """
        delta = self._store.delta(entry.parameter)
        if entry.action is Action.KEEP:
            return self._write(entry, delta, outcome="kept")
        if entry.action is not Action.ADJUST:
            return self._write(entry, delta.zero(), outcome="reset")
        if self._merging is None:
            adjusted, remarks = self._transformed(entry, delta)
        else:
            adjusted, remarks = self._merging.merged(self._rule, entry, delta)
        return self._write(
            entry,
            adjusted,
            outcome="adjusted",
            tuned_loss=self._loss(entry, delta),
            adjusted_loss=self._loss(entry, adjusted),
            notes=remarks,
        )

    def _transformed(self, entry: PlanEntry, delta: Delta) -> tuple[Delta, tuple[str, ...]]:
        rule, remarks = cast(TransformRule, self._rule), tuple[str, ...]()
        for use in entry.uses:
            self._hold(entry, use, delta)
            transform = self._prepared.transform(rule, use, delta.matrix(use))
            delta = delta.transformed(use, transform)
            remarks += transform.notes
        return delta, remarks

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
        self._prepared.hold(entry.uses if use.view.covers(math.prod(entry.shape)) else (use,), delta.device)


def _record(entry: PlanEntry, **values: Any) -> ParameterRecord:  # noqa: ANN401
    described = {
        "parameter": entry.parameter,
        "shape": entry.shape,
        "reason": entry.reason,
        "roles": tuple(use.role for use in entry.uses),
        "aliases": entry.aliases,
        "originals": entry.originals,
    }
    return ParameterRecord(**described | values)


def adjust_weights(
    store: WeightStore,
    plan: Plan,
    profile: SafetyProfile,
    rule: Rule,
    *,
    task: SafetyProfile | None = None,
    progress: bool = True,
) -> Report:
    """Adjust fine-tuned weights wherever they are kept: all of them, or, if anything fails, none.

    Args:
        store: The weights.
        plan: What will be done with each parameter of the store.
        profile: Profile of their base.
        rule: Which part of each delta to keep.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """
    ranks = Ranks.of_run()
    with ranks.together():
        loop = Adjustment(store, plan, profile, rule, task, ranks=ranks, progress=progress)
    with store, ranks.together():  # on a failure all ranks leave the store's block, and put back what they hold
        if rule.auto is None:
            search, records = None, loop.at(rule)
        else:
            search, records = loop.measured(rule, rule.auto)
    return report_of(records, rule, profile, architecture=store.architecture, base=store.source, search=search)


def report_of(
    records: Iterable[ParameterRecord],
    rule: Rule,
    profile: SafetyProfile,
    *,
    architecture: str,
    base: str,
    search: StrengthSearch | None = None,
) -> Report:
    """Tell of an adjustment as a whole.

    Args:
        records: What was done to each parameter.
        rule: The rule.
        profile: Profile of the base.
        architecture: Class name of the model.
        base: Where the base weights came from.
        search: How the strength was found, if it was measured.

    Returns:
        The report.
    """
    return Report(
        rule=RuleRecord(name=rule.name, settings=rule.settings),
        architecture=architecture,
        base=base,
        sequences=profile.header.sequences,
        tokens=profile.header.tokens,
        parameters=tuple(records),
        search=search,
    )
