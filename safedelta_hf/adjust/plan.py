"""What will happen to each parameter, decided from names and shapes before any weight is touched."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from safedelta_hf.adjust.merging import Merging
from safedelta_hf.core.binomial import upper_bound
from safedelta_hf.errors import AdapterError, ConfigurationError, CoverageError, ProfileError
from safedelta_hf.profile.moments import Moments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Action, Plan, PlanEntry, Treatment
from safedelta_hf.records.uses import Use
from safedelta_hf.rules import AutoStrength, MergeRule, Rule


def plan_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    profile: SafetyProfile,
    treatment: Treatment,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
) -> Plan:
    """Decide what happens to some parameters of the model that a profile was made of.

    Args:
        shapes: Shapes of the parameters, or of the weights computed from them, by canonical name.
        profile: Profile of their base.
        treatment: What to do with parameters other than linear weights.
        aliases: Further names of tied parameters; empty for those not named.

    Returns:
        One entry for each parameter; those that read the same moment stand together.

    Raises:
        ProfileError: The profile knows nothing of one of them.
    """
    unknown = sorted(set(shapes) - set(profile.header.base) - set(profile.header.parametrised))
    if unknown:
        raise ProfileError(
            f"profile: {len(unknown)} tuned parameters are not among those of the {profile.header.architecture} that "
            f"it was made for, such as {unknown[0]}. Collect a profile of this model's base"
        )
    aliases = aliases or {}
    uses: dict[str, list[Use]] = {}
    for use in profile.uses:
        uses.setdefault(use.parameter, []).append(use)
    order = {key: number for number, key in enumerate(profile.moments)}
    entries = [
        replace(
            _plan_entry(name, shape, uses.get(name, []), profile, treatment),
            aliases=aliases.get(name, ()),
            originals=profile.header.parametrised.get(name, ()),
        )
        for name, shape in shapes.items()
    ]
    entries.sort(key=lambda entry: order[entry.uses[-1].moment] if entry.uses else len(order))
    return Plan(entries=tuple(entries))


def _plan_entry(
    name: str,
    shape: tuple[int, ...],
    uses: Sequence[Use],
    profile: SafetyProfile,
    treatment: Treatment,
) -> PlanEntry:
    if not uses:
        action = None if treatment.uncovered == "error" else Action(treatment.uncovered)
        reason = profile.header.skipped.get(name, "no supported layer uses it")
        return PlanEntry(parameter=name, shape=shape, action=action, reason=reason)
    actions = {use: treatment.of(use.role) for use in uses}
    action = next(action for action in (Action.RESET, Action.ADJUST, Action.KEEP) if action in actions.values())
    if action is not Action.ADJUST:
        roles = " and ".join(use.role for use in uses)
        return PlanEntry(parameter=name, shape=shape, action=action, reason=f"the setting for {roles} is {action}")
    adjusted = tuple(use for use in uses if actions[use] is Action.ADJUST)
    reason = unreached(shape, adjusted)
    return PlanEntry(parameter=name, shape=shape, action=action, reason=reason, uses=adjusted)


def unreached(shape: tuple[int, ...], uses: tuple[Use, ...]) -> str:
    """What no use of a parameter covers.

    Args:
        shape: Shape of the parameter.
        uses: How it is used.

    Returns:
        A sentence for the report; empty if all of it is covered.
    """
    entries = math.prod(shape)
    views = {use.view for use in uses}
    covered = sum(view.entries for view in views)
    if covered >= entries:
        return ""
    size = max(view.entries for view in views)
    if entries % size == 0 and covered == size * len(views):
        total = entries // size
        return f"the safety data never reached {total - len(views)} of its {total} parts, which keep their delta"
    return f"the safety data never reached {entries - covered} of its {entries} entries, which keep their delta"


def check_rule(rule: Rule, profile: SafetyProfile, task: SafetyProfile | None) -> None:
    """Make sure that there are the profiles that a rule needs.

    Args:
        rule: The rule, at whatever strength.
        profile: Profile of the base.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.

    Raises:
        ProfileError: No safety data was read, and the rule needs it; none was held out for a strength that is to be
            measured, or too little to show what is asked for; or the task's profile is missing or of another base.
    """
    if rule.needs_safety_data and not profile.is_read:
        raise ProfileError(
            f"{rule.name}: this rule needs safety data, and none was read; give the data, or a profile of them, or the "
            "strength as a number to a rule that reads none, such as Scale(strength=1.0)"
        )
    if rule.auto is not None and profile.held_out is None:
        raise ProfileError(
            f"{rule.name}: strength='auto' measures refusals on safety data that no moment has seen, and none of the "
            f"{profile.header.sequences} examples of this profile was held out; collect it of at least 16 examples, "
            "about different things (a quarter is held out then), with ProfileConfig(holdout=0.25) of fewer, or give "
            "the strength as a number, as has to be of a model that classifies"
        )
    if rule.auto is not None and rule.auto.lost is not None and profile.held_out is not None:
        _require_certifiable(rule.auto, rule.auto.lost, len(profile.held_out.sequences))
    if not rule.needs_task:
        return
    if task is None:
        raise ProfileError(
            f"{rule.name}: this rule weighs what the fine-tuning data uses; pass task_profile=collect_profile(base, "
            "task_data, ...), a profile of the same base on examples of that data"
        )
    if dict(task.header.base) != dict(profile.header.base):
        raise ProfileError(
            f"task_profile: made of {task.header.model}, which is another base than that of the safety profile "
            f"({profile.header.model}), or the same in another precision; collect it again"
        )


def _require_certifiable(auto: AutoStrength, lost: float, refusals: int) -> None:
    if auto.allowed(refusals) is None:
        raise ProfileError(
            f"AutoStrength: lost={lost:g} with confidence {auto.confidence:g} takes {auto.needed()} held-out "
            f"refusals, none of them lost, and this profile has {refusals}, which show "
            f"{upper_bound(0, refusals, auto.confidence):.3g} at best; give {auto.needed() - refusals} more of them "
            "(more safety data, or a larger ProfileConfig(holdout=...)), or leave lost out for the least that they show"
        )


def check_entries(
    entries: Sequence[PlanEntry],
    profile: SafetyProfile,
    rule: Rule,
    task: SafetyProfile | None,
    *,
    is_dense: Callable[[str], bool],
) -> Merging | None:
    """Make sure that a rule can do what is planned, before a weight is touched or trained.

    Args:
        entries: Plan of the parameters that are tuned, or will be.
        profile: Profile of their base.
        rule: Which part of each delta will be kept, at whatever strength.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        is_dense: Whether base and fine-tuned weight of a canonical name are at hand, whole, or will be.

    Returns:
        The further models of the rule, if it merges any.

    Raises:
        ProfileError: A moment has another shape, or the rule lacks a profile.
        CoverageError: Nobody said what to do with a parameter that cannot be covered.
        AdapterError: The rule cannot adjust a delta of that form.
        SafeDeltaError: A further model is missing something; named by parameter.
    """
    check_rule(rule, profile, task)
    merging = Merging(rule, entries, profile) if isinstance(rule, MergeRule) else None
    for entry in entries:
        _require_moments(entry, profile.moments)
        if rule.needs_dense and entry.action is Action.ADJUST and not is_dense(entry.parameter):
            raise AdapterError(
                f"{entry.parameter}: {rule.name} merges whole weights, and the adapter holds a delta of another form "
                "apart from its base; merge the adapter (merge_and_unload) and use adjust_model, or choose a rule that "
                "transforms deltas, such as Ridge() or Scale()"
            )
        if merging is not None:
            merging.check(entry)
    _require_decisions(entries)
    return merging


def _require_decisions(entries: Sequence[PlanEntry]) -> None:
    undecided = [entry for entry in entries if entry.action is None]
    if undecided:
        listed = "\n".join(f"  {entry.parameter}: {entry.reason}" for entry in undecided[:20])
        more = f"\n  ... and {len(undecided) - 20} more" if len(undecided) > 20 else ""
        raise CoverageError(
            f"{len(undecided)} trained parameters cannot be covered:\n{listed}{more}\n"
            "Pass treatment=Treatment(uncovered='reset') to put them back to the base, or 'keep' to leave them as tuned"
        )


def _require_moments(entry: PlanEntry, moments: Moments) -> None:
    for use in entry.uses:
        if use.shape != entry.shape:
            raise ProfileError(
                f"{entry.parameter}: has the shape {list(entry.shape)}, and {list(use.shape)} in the model that the "
                "profile was made for; collect a profile of this model's base"
            )
        columns, found = use.view.columns, moments.shape(use.moment)
        if found != ((columns,) if use.role.is_diagonal else (columns, columns)):
            raise ProfileError(
                f"{entry.parameter}: has {columns} inputs, its moment in the profile has the shape {list(found)}; "
                "the profile was made for another model"
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
