"""Sentences and tables as text, within the width of the terminal where there is one."""

import io
import re
import shutil
from collections.abc import Iterator
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNFOLDED: Final = 10_000
"""Columns that are never needed: where there is no terminal, as in a log, nothing is folded."""


class Dotted:
    """A name that is folded after its dots where it has to be.

    Args:
        name: Such as that of a parameter.
    """

    def __init__(self, name: str) -> None:
        self._parts = re.findall(r"[^.]*\.|[^.]+", name)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        sizes = list(map(len, self._parts))
        return Measurement(max(sizes, default=0), sum(sizes))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        line = ""
        for part in self._parts:
            if line and len(line) + len(part) > options.max_width:
                yield Text(line, overflow="fold")
                line = ""
            line += part
        yield Text(line, overflow="fold")


def printed(*parts: str | Table, width: int | None = None) -> str:
    """Set sentences and tables one below the other.

    Args:
        parts: Sentences and tables; empty ones are left out.
        width: Columns that none is wider than; None for those of the terminal, and where there is none, as many as are
            needed.

    Returns:
        Text that ends with a line break.
    """
    text = io.StringIO()
    columns = width or shutil.get_terminal_size((UNFOLDED, 0)).columns
    console = Console(file=text, width=columns, highlight=False, markup=False, emoji=False)
    for part in parts:
        if part:
            console.print(part)
    return text.getvalue()
