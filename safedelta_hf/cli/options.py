"""What several commands take."""

from collections.abc import Mapping
from typing import Literal, TypeVar

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import RULES, Rule, default_rule

T = TypeVar("T")

RULE_HELP = f"How to adjust: {', '.join(RULES)}."
DEFAULT_RULE_HELP = (
    f"Default {default_rule('a task').name} where task data are at hand, else {default_rule(None).name}."
)
STRENGTH_HELP = "Strength of the rule: a number, or 'auto' to measure."


def chosen_rule(name: str | None, strength: str | None, task: object | None) -> Rule:
    """The rule that options name.

    Args:
        name: Value of `--rule`; None for the default.
        strength: Value of `--strength`; None for the rule's own default.
        task: The task data, or what stands for them, if they are at hand.

    Returns:
        The rule.

    Raises:
        ConfigurationError: There is no such rule, or the strength is none.
    """
    rule = type(default_rule(task)) if name is None else one_of(RULES, name, "--rule")
    return rule() if strength is None else rule(strength=parsed_strength(strength))


def parsed_strength(strength: str) -> float | Literal["auto"]:
    """What `--strength` says.

    Args:
        strength: Its value.

    Returns:
        A number, or "auto".

    Raises:
        ConfigurationError: It is neither.
    """
    if strength == "auto":
        return "auto"
    try:
        return float(strength)
    except ValueError:
        raise ConfigurationError(f"--strength {strength!r} is neither a number nor 'auto'") from None


def one_of(known: Mapping[str, T], name: str, option: str) -> T:
    """Look a name up.

    Args:
        known: What there is.
        name: What was asked for.
        option: By which option.

    Returns:
        What has that name.

    Raises:
        ConfigurationError: Nothing has.
    """
    if name not in known:
        raise ConfigurationError(f"{option} {name!r} is not one of {', '.join(known)}")
    return known[name]
