"""How errors look on the command line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from safedelta_hf.errors import SafeDeltaError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line and status 1 on what this package reports on purpose.

    Yields:
        Nothing.
    """
    try:
        yield
    except SafeDeltaError as error:
        typer.echo(f"safedelta: {error}", err=True)
        sys.exit(1)
