"""The command itself: its list of commands, and what it takes to show it."""

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

import safedelta_hf
from safedelta_hf.cli.main import COMMANDS, app

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "matplotlib")


def imported_by(code):
    ending = f"\nimport sys; print([name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", code + ending]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def run_of(*commands):
    calls = "".join(f"with suppress(SystemExit): app({list(command)})\n" for command in commands)
    return f"from contextlib import suppress\nfrom safedelta_hf.cli.main import app\n{calls}"


@pytest.mark.parametrize(
    "code",
    [
        "import safedelta_hf",
        "import safedelta_hf.evaluation.board",
        run_of(["--help"], ["--version"]),
        *(run_of([name, "--help"]) for name in COMMANDS),
        run_of(*([name, "--nonsense"] for name in COMMANDS)),
        run_of(["apply", "--tuned=a", "--output=b", "--rule=magic"], ["demo", "--case=magic"]),
    ],
)
def test_nothing_that_takes_seconds_is_imported_before_it_is_used(code):
    assert imported_by(code) == "[]"


def test_every_public_name_is_there():
    assert list(safedelta_hf.__all__) == sorted(safedelta_hf.__all__) and "__version__" in safedelta_hf.__all__
    assert all(getattr(safedelta_hf, name) is not None for name in safedelta_hf.__all__)
    assert set(safedelta_hf.__all__) <= set(dir(safedelta_hf)) | {"__version__"}
    with pytest.raises(AttributeError, match="nothing"):
        safedelta_hf.nothing  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_as_its_own_help_begins(name):
    place, summary = COMMANDS[name]
    module, function = place.split(":")
    said = inspect.getdoc(getattr(importlib.import_module(module), function))
    assert said.splitlines()[0] == summary
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0 and (name == "show" or "--output" in shown.output)


def test_help_lists_every_command_and_an_unknown_one_is_an_error():
    shown = CliRunner().invoke(app, ["--help"])
    assert all(name in shown.output for name in COMMANDS)
    unknown = CliRunner().invoke(app, ["repair"])
    assert unknown.exit_code == 2 and "No such command" in unknown.output


def test_the_version_is_told_by_the_option_and_by_the_module():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == version("safedelta-hf")
    command = [sys.executable, "-m", "safedelta_hf", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == version("safedelta-hf")
