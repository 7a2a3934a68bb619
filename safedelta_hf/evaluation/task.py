"""Scores of task responses: functions of a response and the row that it answers."""

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.scoring import exact_match, final_match

TaskScore = Callable[[str, Mapping[str, Any]], bool | float]
"""From a response, and the row of the prompt file that it answers, to how right it is: yes or no, or from 0 to 1."""

_DOTTED: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def exact_answer(response: str, row: Mapping[str, Any]) -> float:
    """Score 1 where a response equals the answer of its row, apart from case and spacing.

    Args:
        response: The response.
        row: A row with `answer` or `completion`, or whose `messages` end in an assistant turn.

    Returns:
        1 or 0.
    """
    return exact_match([response], [answer_of(row)])


def final_answer(response: str, row: Mapping[str, Any]) -> float:
    """Score 1 where a response is the answer of its row, alone or after a preamble that ends in a colon.

    Args:
        response: The response.
        row: A row with `answer` or `completion`, or whose `messages` end in an assistant turn.

    Returns:
        1 or 0.
    """
    return final_match([response], [answer_of(row)])


def answer_of(row: Mapping[str, Any]) -> str:
    """The right answer that a row of a prompt file names.

    Args:
        row: The row.

    Returns:
        Its `answer`, its `completion`, or the assistant turn that ends its `messages`.

    Raises:
        DataError: It names none.
    """
    turns = row.get("messages") or [{}]
    given = [row.get("answer"), row.get("completion"), turns[-1].get("content") if _is_answer(turns[-1]) else None]
    answer = next((text for text in given if isinstance(text, str) and text.strip()), None)
    if answer is None:
        raise DataError(
            f"task: a row with the keys {sorted(row)} names no answer; give 'answer', 'completion', or 'messages' that "
            "end in an assistant turn"
        )
    return answer


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


def _is_answer(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") == "assistant"
