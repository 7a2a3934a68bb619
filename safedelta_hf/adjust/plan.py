"""What will happen to each parameter, decided from names and shapes before any weight is touched."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from safedelta_hf.errors import CoverageError, ProfileError
from safedelta_hf.profile.moments import Moments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records import Action, Plan, PlanEntry, Treatment, Use


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


def check_moments(entry: PlanEntry, moments: Moments) -> None:
    """Make sure that a profile was made of a parameter of this shape, and that its moments are of its inputs.

    Args:
        entry: Plan of the parameter.
        moments: Moments of the profile.

    Raises:
        ProfileError: The parameter or one of the moments has another shape.
    """
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
