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
from safedelta_hf.report import Report
from safedelta_hf.report.printing import printed
from safedelta_hf.report.provenance import restore_card

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


def save_report(callback: SafeDeltaCallback, folder: str | Path) -> Report:
    """Save the report beside the model, on the main process.

    Args:
        callback: The callback of the run.
        folder: Where the run saves its model.

    Returns:
        The report.

    Raises:
        AdjustmentError: The run has ended without an adjustment.
    """
    if callback.report is None:
        raise AdjustmentError(
            "the run has ended, and nothing was adjusted: there was no training, or its trainer does not call "
            f"callbacks. What it saved to {folder} is as it was trained"
        )
    if PartialState().is_main_process:
        callback.report.save(Path(folder) / REPORT)
    return callback.report


def tell(callback: SafeDeltaCallback, folder: str | Path) -> None:
    """Show what was done, when all else was said and the model is saved; on the main process.

    The report is saved beside the model, whose README gets its section back if it was written by something else than
    the method of this very trainer, as LLaMA-Factory does.

    Args:
        callback: The callback of the run.
        folder: Where the run has saved its model.
    """
    report = save_report(callback, folder)
    if PartialState().is_main_process:
        restore_card(Path(folder))
        typer.echo(f"{printed(f'Safe Delta: {report.summary()}')}The whole report: {Path(folder) / REPORT}")
