"""What every way to adjust takes, checked and opened before anything is read of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safedelta_hf.errors import ConfigurationError, require_kind
from safedelta_hf.profile.profile import SafetyProfile, opened_profile
from safedelta_hf.records.plan import Treatment
from safedelta_hf.rules import Rule, rule_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of an adjustment, of the kinds that they have to be.

    Attributes:
        profile: Profile of the base.
        rule: Which part of each delta to keep.
        task: Profile of the base on the task data, if it was given.
        treatment: What to do with parameters other than linear weights.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
    """

    profile: SafetyProfile
    rule: Rule
    task: SafetyProfile | None
    treatment: Treatment
    workspace: Path | None


def opened_settings(
    owner: str,
    profile: object,
    rule: object,
    task: object,
    treatment: object,
    workspace: object = None,
    *,
    without_data: Callable[[], SafetyProfile],
) -> Settings:
    """Check the arguments of an adjustment, and open the profiles that they name.

    Args:
        owner: What has the arguments, for errors.
        profile: A profile, the folder of one, or its repository on the Hub; None for a rule that needs no data.
        rule: A rule, the name of one, or None for the default.
        task: As `profile`; None for none.
        treatment: A treatment; None for the default.
        workspace: A folder, or None.
        without_data: Describes the base where no profile was given.

    Returns:
        The arguments.

    Raises:
        ConfigurationError: One is of another kind, or the rule needs a profile and there is none.
        ProfileError: A profile cannot be read.
    """
    chosen = rule_of(owner, rule, task)
    require_kind(owner, "treatment", treatment, (Treatment, type(None)), "a Treatment")
    require_kind(owner, "workspace", workspace, (str, Path, type(None)), "a folder")
    if profile is None and chosen.needs_safety_data:
        raise ConfigurationError(
            f"{owner}: {chosen.name} needs a safety profile of the base; give profile=collect_profile(base, "
            "safety_data, ...), or the folder of one (--profile)"
        )
    return Settings(
        profile=without_data() if profile is None else opened_profile(owner, profile),
        rule=chosen,
        task=None if task is None else opened_profile(owner, task, "task_profile"),
        treatment=treatment if isinstance(treatment, Treatment) else Treatment(),
        workspace=Path(workspace) if isinstance(workspace, str | Path) else None,
    )
