"""Bars for who watches a terminal or a notebook, and plain lines for who reads a log."""

import sys
from collections.abc import Iterable, Sized
from typing import Any, Final

from tqdm.auto import tqdm as shown_bar
from tqdm.std import tqdm as terminal_bar

EVERY: Final = 30.0
"""Seconds between two lines about the same work where there is no terminal."""

_LINE: Final = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}]"

_BAR: Final = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
"""Without a rate, so that there is room for what is done in a terminal of 80 columns."""


class _Lines:
    """Takes what a bar draws over and over, and writes each state that is new as a line."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            sys.stderr.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[Any] | None = None, *, desc: str | None, unit: str, **settings: Any) -> Any:  # noqa: ANN401
    """A bar of tqdm; where nobody can see one move, a line at the end, and every half minute.

    Args:
        iterable: What is worked through; None for a bar that is moved by `update`.
        desc: What is done; may be None where the bar is switched off.
        unit: What is counted.
        **settings: Further ones of tqdm, such as `total` and `disable`.

    Returns:
        The bar, which is also an iterator and a context manager; it says nothing where there is nothing to do.
    """
    if isinstance(iterable, Sized) and not len(iterable):
        settings["disable"] = True
    is_notebook = shown_bar.__mro__[1] is not terminal_bar and "notebook" in shown_bar.__mro__[1].__module__
    if is_notebook:
        return shown_bar(iterable, desc=desc, unit=unit, **settings)
    if sys.stderr.isatty():
        return shown_bar(iterable, desc=desc, unit=unit, dynamic_ncols=True, bar_format=_BAR, **settings)
    # Any delay leaves out the line before anything is done; one that is too small to be waited for, no other.
    plain = {"file": _Lines(), "bar_format": _LINE, "mininterval": EVERY, "delay": 1e-9}
    return terminal_bar(iterable, desc=desc, unit=unit, **plain, **settings)
