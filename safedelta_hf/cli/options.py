"""What several commands take, and how errors look."""

import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import typer

from safedelta_hf.errors import ConfigurationError, SafeDeltaError, SafeDeltaWarning
from safedelta_hf.report.printing import printed

if TYPE_CHECKING:
    from safedelta_hf.rules import Rule

STOPPED: Final = 130
"""Exit status after Ctrl-C, as shells give it."""

_DOTTED: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# Names as help tells them: what has these names takes seconds to import, and a test compares.
UNREADING_RULES: Final = ("scale", "slerp", "dare", "ties", "model_stock", "safe_merge", "safe_patch")
RULE_NAMES: Final = ("safe_delta", "ridge", "task_ridge", *UNREADING_RULES)
CASE_NAMES: Final = ("harmful", "identity", "mixed", "skill", "benign")
TRAINED_NAMES: Final = ("full", "lora")
CHEAP_METHOD_NAMES: Final = ("lower_rate", "retuned", "mixed_in")
METHOD_NAMES: Final = (
    *CHEAP_METHOD_NAMES,
    "polish",
    "mixture",
    "refusal_mix",
    "derta",
    "sap",
    "sppft",
    "projected",
)
GUARD_NAMES: Final = ("llama-guard", "wildguard", "shieldgemma", "harmbench", "strongreject", "own")
STORAGE_NAMES: Final = ("float32", "triangular", "bfloat16", "eigenbasis:RANK")

RULE_HELP = f"How to adjust: {', '.join(RULE_NAMES)}."
DEFAULT_RULE_HELP = "Default task_ridge where task data are at hand, else ridge."
SAFETY_DATA_HELP = (
    f"Harmful prompts with the base's refusals; not needed by {', '.join(UNREADING_RULES)} where --strength is a "
    "number."
)
SORT_TASK_HELP = "Leave out of the task what the base would refuse, as it refuses the safety data."
ORDINARY_WEIGHT: Final = 0.1
ORDINARY_WEIGHT_HELP = f"Weight of the ordinary data; default {ORDINARY_WEIGHT:g}."
STRENGTH_HELP = "Strength of the rule: a number, or 'auto' to measure."


def chosen_rule(name: str | None, strength: str | None, task: object | None) -> "Rule":
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
    given = None if strength is None else parsed_strength(strength)
    if name is not None:
        require_one_of(RULE_NAMES, name, "--rule")
    from safedelta_hf.rules import RULES, default_rule

    rule = type(default_rule(task)) if name is None else RULES[name]
    return rule() if given is None else rule(strength=given)


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


def require_one_of(known: Collection[str], name: str, option: str) -> None:
    """Stop at a name that nothing has.

    Args:
        known: The names that there are.
        name: What was asked for.
        option: By which option.

    Raises:
        ConfigurationError: Nothing has.
    """
    if name not in known:
        raise ConfigurationError(f"{option} {name!r} is not one of {', '.join(known)}")


def quieten_libraries(*, bars: bool = True) -> None:
    """Leave out what transformers says of its own work.

    Args:
        bars: Whether its bars are left out too, beside its warnings.
    """
    from transformers.utils import logging  # takes seconds

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if bars:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line and status 1 on what this package reports on purpose, and where there is no room.

    Its warnings are lines too, without the place in its code. Ctrl-C ends with status 130.

    Yields:
        Nothing.
    """
    usual = warnings.formatwarning
    warnings.formatwarning = partial(_formatted, usual)
    try:
        yield
    except (SafeDeltaError, OSError, MemoryError) as error:
        typer.echo(
            f"safedelta: {' '.join(str(error).split()) or type(error).__name__}", err=True
        )  # libraries speak in several lines
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo(
            "safedelta: stopped; what was given is as it was, and the same command goes on from what is finished, or "
            "begins again",
            err=True,
        )
        sys.exit(STOPPED)
    finally:
        warnings.formatwarning = usual


def _formatted(usual: Callable[..., str], message: Warning | str, category: type[Warning], *place: Any) -> str:  # noqa: ANN401
    if issubclass(category, SafeDeltaWarning):
        return printed(f"Warning: {message}")
    return usual(message, category, *place)


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
