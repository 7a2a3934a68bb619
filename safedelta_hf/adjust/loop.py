"""The only loop over parameters: check all, then adjust all of them or none."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from safedelta_hf.adjust.factors import FactorCache
from safedelta_hf.adjust.plan import check_entries, check_rule, require_number
from safedelta_hf.adjust.search import search_strength
from safedelta_hf.adjust.store import WeightStore
from safedelta_hf.core.curvature import loss_by_price, quadratic_loss
from safedelta_hf.core.rounding import is_coarse
from safedelta_hf.data.refusals import Drift
from safedelta_hf.deltas.dense import Delta
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import SafeDeltaError, warn
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Action, Plan, PlanEntry
from safedelta_hf.records.uses import MatrixView, Use
from safedelta_hf.report import Report
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.report.records import ParameterRecord, RuleRecord
from safedelta_hf.report.search import StrengthSearch, Trial
from safedelta_hf.rules import AutoStrength, LayerMoments, MergeRule, Rule, TransformRule

EXPECTED_TRIALS = 8
"""Strengths that a search tries, about: what a progress bar reckons with."""

LEAST_FED_ON = 0.01
"""Share of the quadratic loss of a factored delta that rounding to the nearest may add before its errors are fed on."""

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
    """

    def __init__(
        self,
        store: WeightStore,
        plan: Plan,
        profile: SafetyProfile,
        rule: Rule,
        task: SafetyProfile | None,
        *,
        ranks: Ranks,
        bar: Any,  # noqa: ANN401 - of tqdm
    ) -> None:
        check_rule(rule, profile, task)
        self._store, self._plan, self._profile = store, plan, profile
        self._task = task if rule.needs_task else None
        self._ranks, self._bar = ranks, bar
        tuned = [
            entry
            for entry in self._counted()
            if self._is_left_for_later(entry, rule) or store.is_tuned(entry.parameter)
        ]
        self._merging = check_entries(tuned, profile, rule, task, is_dense=store.is_dense)
        self._tuned = {entry.parameter: entry for entry in tuned}
        if plan.entries and not tuned:
            store.require_base()

    def _counted(self) -> Iterator[PlanEntry]:
        for entry in self._plan.entries:
            yield entry
            self._bar.update()

    def _is_left_for_later(self, entry: PlanEntry, rule: Rule) -> bool:
        # But for what may be an error of a weight that was moved, and of no other.
        return not self._store.overwrites and entry.action is not None and not isinstance(rule, MergeRule)

    def at(
        self, rule: Rule, factors: FactorCache | None = None, *, figures: bool = True
    ) -> tuple[ParameterRecord, ...]:
        """Adjust every parameter.

        Args:
            rule: Which part of each delta to keep, at a strength that is a number.
            factors: What the same rule made of the moments before, at whatever strength.
            figures: Whether to measure energies and losses, which cost about as much as the adjustment.

        Returns:
            What was done to each parameter.

        Raises:
            SafeDeltaError: Named by parameter.
        """
        factors = factors or self._factors()
        records = []
        for entry in self._counted():
            if self._is_left_for_later(entry, rule) and not self._store.is_tuned(entry.parameter):
                del self._tuned[entry.parameter]
                if not self._tuned:
                    self._store.require_base()
            if entry.parameter in self._tuned:
                try:
                    record = self._adjust(entry, rule, factors, figures=figures)
                except SafeDeltaError as error:
                    raise error.at(entry.parameter) from error
            else:
                record = _record(entry, outcome="unchanged", reason="the fine-tuning did not move it")
            self._store.finish(record)
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
        running, held_out = self._store.running, self._profile.held_out
        if running is None:
            require_number(rule)
        assert running is not None and held_out is not None, "checked before any weight was touched"
        factors = self._factors(memory=REUSED_BYTES) if rule.factors_serve_any_strength else None

        def apply(strength: float, *, figures: bool) -> tuple[ParameterRecord, ...]:
            self._store.restore()
            return self.at(rule.at(strength), factors, figures=figures)

        self._put_base()
        base, noise = held_out.read_again(running, bar=self._bar)
        number, last = itertools.count(1), ""

        def tell(trial: Trial) -> None:
            nonlocal last
            last = f" ({trial.strength:.3g} {'passes' if trial.passed else 'fails'})"

        def measure(strength: float) -> Drift:
            # At least this trial is left, and the strength that is found.
            left = 2 * len(self._plan.entries) + len(held_out.sequences)
            self._bar.total = max(self._bar.total, self._bar.n + left)
            self._bar.set_description_str(f"Trial {next(number)} of about {EXPECTED_TRIALS}{last}")
            apply(strength, figures=False)
            return Drift.between(base, held_out.read(running, bar=self._bar))

        refusals = sum(reading.surely_begins for reading in base)
        search = search_strength(rule, auto, measure, refusals, len(base) - refusals, tell)
        self._bar.set_description_str(f"Adjusting at strength {search.strength:.3g}")
        return replace(search, noise=noise), apply(search.strength, figures=True)

    def _put_base(self) -> None:
        for name in self._tuned:
            self._store.write(name, self._store.delta(name).zero())

    def _factors(self, memory: int = 0) -> FactorCache:
        uses = (use for entry in self._tuned.values() for use in entry.uses)
        return FactorCache(self._profile, self._task, uses=uses, ranks=self._ranks, memory=memory)

    def _adjust(self, entry: PlanEntry, rule: Rule, factors: FactorCache, *, figures: bool) -> ParameterRecord:
        delta = self._store.delta(entry.parameter)
        if entry.action is not Action.ADJUST:
            kept, outcome = (delta, "kept") if entry.action is Action.KEEP else (delta.zero(), "reset")
            written, notes = self._store.write(entry.parameter, kept)
            return _record(entry, written if figures else None, outcome=outcome, notes=notes)
        losses = {"tuned_loss": _loss(entry, delta, factors)} if figures else {}
        price = None
        if self._merging is None:
            kept, notes, price = _transformed(entry, delta, cast(TransformRule, rule), factors)
        else:
            kept, notes = self._merging.merged(rule, entry, delta)
        carried = kept
        if is_coarse(delta.dtype):
            if figures:
                losses["unrounded_loss"] = _loss_of_kept(entry, kept, kept, price, factors)
            carried, note = _rounded(entry, kept, factors)
            notes += (note,)
        written, remarks = self._store.write(entry.parameter, carried)
        if figures:
            losses["adjusted_loss"] = _loss_of_kept(entry, kept, written, price, factors)
        return _record(entry, written if figures else None, outcome="adjusted", notes=notes + remarks, **losses)


def _transformed(
    entry: PlanEntry, delta: Delta, rule: TransformRule, factors: FactorCache
) -> tuple[Delta, tuple[str, ...], float | None]:
    # What of it is kept, with what there is to say about it, and its price, where one transform tells it.
    notes: tuple[str, ...] = ()
    price = None
    for use in entry.uses if rule.reads_moments else _once(entry):
        if rule.reads_moments:
            factors.hold(_together(entry, use), delta.device)
            transform = factors.transform(rule, use, delta.matrix(use))
        else:
            none = LayerMoments(safety=torch.zeros(use.view.columns, device=delta.device))
            transform = rule.transform(rule.factorise(none), delta.matrix(use))
        delta = delta.transformed(use, transform)
        notes += transform.notes
        price = transform.price
    return delta, notes, price if len(entry.uses) == 1 else None


def _once(entry: PlanEntry) -> Iterator[Use]:
    # Uses that moments alone tell apart are one: a tied embedding and head, a matrix that is read both ways.
    whole = next((use for use in entry.uses if use.view.covers(math.prod(entry.shape))), None)
    seen: set[MatrixView] = set()
    for use in entry.uses if whole is None else (whole,):
        if use.view not in seen:
            yield use
        seen |= {use.view, use.view.transposed}


def _rounded(entry: PlanEntry, kept: Delta, factors: FactorCache) -> tuple[Delta, str]:
    """Round what is kept of a delta to the data type of its weights, so that it costs little safety.

    Args:
        entry: Plan of the parameter.
        kept: What is kept of it.
        factors: The moments.

    Returns:
        What the weights can hold of it, and how it was rounded.
    """

    def feeding() -> Iterator[tuple[Use, Tensor]]:
        for use in mixing:
            factors.hold(_together(entry, use), kept.device)
            yield use, factors.rounding(use)

    mixing = [use for use in entry.uses if not use.role.is_diagonal]  # of others nothing can make up for an error
    name = str(kept.dtype).removeprefix("torch.")
    if not mixing or factors.is_empty or (kept.is_factored and _rounds_well(entry, kept, factors)):
        return kept.rounded(), f"rounded to the nearest {name}"
    return kept.rounded_along(feeding()).rounded(), f"rounded to {name}, errors fed on"


def _rounds_well(entry: PlanEntry, kept: Delta, factors: FactorCache) -> bool:
    # Factors hold a delta and no base, so their errors are mostly nothing beside it; feeding them on takes a Cholesky.
    rounded, unrounded = (_loss(entry, delta, factors) for delta in (kept.rounded(), kept))
    return rounded is not None and unrounded is not None and rounded <= (1 + LEAST_FED_ON) * unrounded


def _loss(entry: PlanEntry, delta: Delta, factors: FactorCache) -> float | None:
    if factors.is_empty:
        return None
    total = 0.0
    for use in entry.uses:
        factors.hold(_together(entry, use), delta.device)
        total += quadratic_loss(delta.matrix(use).inner, factors.hessian(use))
    return total


def _loss_of_kept(
    entry: PlanEntry, kept: Delta, carried: Delta, price: float | None, factors: FactorCache
) -> float | None:
    # From what is lost where that is exact enough, without a product.
    if price is not None and isinstance(hessian := factors.hessian(entry.uses[0]), Tensor):
        lost = kept.lost(carried)
        loss = None if lost is None else loss_by_price(lost, price, hessian)
        if loss is not None:
            return loss
    return _loss(entry, carried, factors)


def _together(entry: PlanEntry, use: Use) -> Sequence[Use]:
    # Of a parameter with many parts, such as experts, one Hessian at a time.
    return entry.uses if use.view.covers(math.prod(entry.shape)) else (use,)


def _record(entry: PlanEntry, written: Delta | None = None, **values: Any) -> ParameterRecord:  # noqa: ANN401
    if written is not None:
        values |= {"delta_energy": written.tuned_energy, "lost_energy": written.lost_energy}
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
    ranks: Ranks | None = None,
    progress: bool = True,
) -> Report:
    """Adjust fine-tuned weights wherever they are kept: all of them, or, if anything fails, none.

    Args:
        store: The weights.
        plan: What will be done with each parameter of the store.
        profile: Profile of their base.
        rule: Which part of each delta to keep.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        ranks: The processes that adjust them together; None for those of the run.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """
    ranks = ranks or Ranks.of_run()
    # Every weight is looked at once, and adjusted at each strength that is tried, and at the one that is found.
    steps, unit = 2 * len(plan.entries), "weight"
    if rule.auto is not None:
        steps, unit = steps + EXPECTED_TRIALS * len(plan.entries) + _readings(profile, ranks), "step"
    with progress_bar(desc="Checking weights", unit=unit, total=steps, disable=not (progress and ranks.is_main)) as bar:
        with ranks.together():
            loop = Adjustment(store, plan, profile, rule, task, ranks=ranks, bar=bar)
        with store, ranks.together():  # on a failure all ranks leave the store's block, and put back what they hold
            bar.set_description_str(f"Adjusting ({rule.name})" if rule.auto is None else "Measuring strength")
            if rule.auto is None:
                search, records = None, loop.at(rule)
            else:
                search, records = loop.measured(rule, rule.auto)
            report = report_of(
                records, rule, profile, task, architecture=store.architecture, base=store.source, search=search
            )
            report = replace(report, unverified=store.unverified)
            store.conclude(report)
        bar.total = bar.n
        bar.set_description_str("Adjusted" if store.running is not None else "Written")
    if report.warning and ranks.is_main:
        warn(f"{rule.name}: {report.warning}")
    return report


def _readings(profile: SafetyProfile, ranks: Ranks) -> int:
    # The base reads the held-out refusals twice, for the noise, and each trial once; equal ones are read once.
    refusals = 0 if profile.held_out is None else len(set(profile.held_out.sequences))
    return (2 + EXPECTED_TRIALS) * math.ceil(refusals / ranks.size)


def report_of(
    records: Iterable[ParameterRecord],
    rule: Rule,
    profile: SafetyProfile,
    task: SafetyProfile | None = None,
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
        task: Profile of that base on the task data, if there was one.
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
        base_model=profile.header.address,
        base_digest=profile.header.digest,
        data=profile.header.data,
        sequences=profile.header.sequences,
        tokens=profile.header.tokens,
        parameters=tuple(records),
        search=search,
        sorting=task.header.sorting if task is not None and rule.needs_task else None,
    )
