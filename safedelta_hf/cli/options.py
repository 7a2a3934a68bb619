"""What several commands take, and how errors look."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeVar

import typer

from safedelta_hf.errors import ConfigurationError, SafeDeltaError
from safedelta_hf.rules import RULES, Rule, default_rule

T = TypeVar("T")

_DOTTED: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

RULE_HELP = f"How to adjust: {', '.join(RULES)}."
DEFAULT_RULE_HELP = (
    f"Default {default_rule('a task').name} where task data are at hand, else {default_rule(None).name}."
)
_UNREADING: Final = ", ".join(name for name, rule in RULES.items() if not rule.reads_moments)
SAFETY_DATA_HELP = f"Harmful prompts with the base's refusals; not needed by {_UNREADING} where --strength is a number."
SORT_TASK_HELP = "Leave out of the task what the base would refuse, as it refuses the safety data."
ORDINARY_WEIGHT: Final = 0.1
ORDINARY_WEIGHT_HELP = f"Weight of the ordinary data; default {ORDINARY_WEIGHT:g}."
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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line and status 1 on what this package reports on purpose, and where there is no room.

    Yields:
        Nothing.
    """
    try:
        yield
    except (SafeDeltaError, OSError, MemoryError) as error:
        typer.echo(
            f"safedelta: {' '.join(str(error).split()) or type(error).__name__}", err=True
        )  # libraries speak in several lines
        sys.exit(1)


def is_dotted(path: str) -> bool:
    """Tell whether a text has the form `module:function`.

    Args:
        path: The text.

    Returns:
        Whether it has.
    """
    return _DOTTED.fullmatch(path) is not None


def load_function(path: str, option: str) -> Callable[..., Any]:
    """Import a user's function, also from the working directory.

    Args:
        path: `module:function`.
        option: What it was given for, for messages.

    Returns:
        The function.

    Raises:
        ConfigurationError: The path has another form, or there is no such function.
    """
    if not is_dotted(path):
        raise ConfigurationError(f"{option} {path!r} is not of the form module:function")
    module, name = path.split(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{option} {path!r} cannot be imported ({error})") from error
    if not callable(function):
        raise ConfigurationError(f"{option} {path!r} is no function")
    loaded: Callable[..., Any] = function
    return loaded
