"""`safedelta show`: what a folder of weights says of its adjustment, and whether the weights are the ones."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from safedelta_hf.cli.options import one_line_errors
from safedelta_hf.report.printing import printed
from safedelta_hf.report.provenance import RECORD_FILE, read_provenance


def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model or adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as it is on disk.")] = False,
) -> None:
    """Read what a folder of weights says of its adjustment, and whether the weights are the ones.

    Exits with 1 where it says nothing, and where the weights are not the ones that were adjusted.
    """
    with one_line_errors():
        found = read_provenance(folder)
        if found is None:
            typer.echo(f"{folder}: not adjusted, or saved by something that leaves no {RECORD_FILE}.")
            sys.exit(1)
        typer.echo(f"{json.dumps(found.content, indent=1)}\n" if as_json else printed(found.told), nl=False)
        if not found.is_of_weights:
            typer.echo(f"safedelta: {found.compared}", err=True)
            sys.exit(1)
