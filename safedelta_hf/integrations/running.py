"""How a run with a `safedelta:` section begins and ends."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import typer
from accelerate import PartialState

from safedelta_hf.errors import AdjustmentError, ConfigurationError, SafeDeltaError
from safedelta_hf.hf.callback import SafeDeltaCallback

REPORT: Final = "safedelta-report.json"
"""Name of the report's file, in the folder that the run saves its model to."""


@contextmanager
def wrong_use_told() -> Iterator[None]:
    """End the program with one line and status 1 where it was started in a wrong way.

    Yields:
        Nothing.
    """
    try:
        yield
    except SafeDeltaError as error:
        typer.echo(f"safedelta: {' '.join(str(error).split())}", err=True)  # libraries speak in several lines
        sys.exit(1)


def require_installed(package: str, distribution: str) -> None:
    """Make sure that a trainer's package is there.

    Args:
        package: What is imported.
        distribution: What is installed.

    Raises:
        ConfigurationError: It is not.
    """
    if find_spec(package) is None:
        raise ConfigurationError(f"{distribution} is not installed in this environment; pip install {distribution}")


def tell(callback: SafeDeltaCallback, folder: str | Path) -> None:
    """Show what was done, and save the report beside the model; on the main process.

    Args:
        callback: The callback of the run.
        folder: Where the run saves its model.

    Raises:
        AdjustmentError: The run has ended without an adjustment.
    """
    if callback.report is None:
        raise AdjustmentError(
            "the run has ended, and nothing was adjusted: there was no training, or its trainer does not call "
            f"callbacks. What it saved to {folder} is as it was trained"
        )
    if PartialState().is_main_process:
        path = Path(folder) / REPORT
        callback.report.save(path)
        typer.echo(f"Safe Delta: {callback.report.summary()}\nThe whole report: {path}")
