"""Sentences and tables as text, within the width of the terminal where there is one."""

import io
import shutil
from typing import Final

from rich.console import Console
from rich.table import Table

UNFOLDED: Final = 10_000
"""Columns that no table needs: where there is no terminal, as in a log, none of its names is folded."""

SENTENCES: Final = 120
"""Columns of sentences where there is no terminal."""


def printed(*parts: str | Table, width: int | None = None) -> str:
    """Set sentences and tables one below the other.

    Args:
        parts: Sentences and tables; empty ones are left out.
        width: Columns that none is wider than; None for those of the terminal, and where there is none, as many as a
            table needs.

    Returns:
        Text that ends with a line break.
    """
    text = io.StringIO()
    columns = width or shutil.get_terminal_size((0, 0)).columns
    console = Console(file=text, width=columns or UNFOLDED, highlight=False, markup=False)
    for part in parts:
        if part:
            console.print(part, width=SENTENCES if isinstance(part, str) and not columns else None)
    return text.getvalue()
