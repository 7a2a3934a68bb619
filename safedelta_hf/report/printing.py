"""Sentences and tables as text, within the width of the terminal where there is one."""

import io
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

UNFOLDED: Final = 10_000
"""Columns that are never needed: where there is no terminal, as in a log, nothing is folded."""


PARAMETER: Final = r"(?<=\.)"
"""Where the name of a parameter is folded."""

SCORE: Final = r"(?<=_)"
"""Where the name of a score is folded."""

INTERVAL: Final = r"(?=\()"
"""Where a figure with an interval in brackets is folded."""


_QUOTED: Final = re.compile(r"""`[^`\n]+`|"[^"\n]+"|(?<!\w)'[^'\n]+'(?!\w)""")
_SPACE: Final = "\0"


class Foldable:
    """A text that is folded where that can be read, if it has to be.

    Args:
        text: Such as the name of a parameter.
        place: Regular expression of the places, which are empty.
    """

    def __init__(self, text: str, place: str) -> None:
        self._parts = [part for part in re.split(place, text) if part]

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

    Lines of sentences end at a space, outside of quotation marks: a path or a command that is wider than the terminal
    is left to it to fold, so that it can be copied in one piece.

    Args:
        parts: Sentences and tables; empty ones are left out.
        width: Columns that none is wider than, but for such a path; None for those of the terminal, and where there is
            none, as many as are needed.

    Returns:
        Text that ends with a line break.
    """
    text = io.StringIO()
    columns = width or shutil.get_terminal_size((UNFOLDED, 0)).columns
    console = Console(file=text, width=columns, highlight=False, markup=False, emoji=False)
    for part in parts:
        if isinstance(part, str) and part:
            text.writelines(f"{_filled(line, columns)}\n" for line in part.split("\n"))
        elif part:
            console.print(part)
    return re.sub(" +\n", "\n", text.getvalue())


def written(*paths: Path, note: str = "") -> str:
    """Say which files or folders were written, each in a line of its own, so that each can be copied.

    Args:
        *paths: What was written.
        note: What follows the last.

    Returns:
        Text without a line break at its end.
    """
    first = "Written: "
    return first + f"\n{' ' * len(first)}".join(map(str, paths)) + note


def _filled(line: str, columns: int) -> str:
    indent = " " * (len(line) - len(line.lstrip(" ")))
    whole = _QUOTED.sub(lambda found: found.group().replace(" ", _SPACE), line)
    wrapped = textwrap.wrap(
        whole,
        columns,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
        expand_tabs=False,
    )
    return "\n".join(wrapped).replace(_SPACE, " ")
