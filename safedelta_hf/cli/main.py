"""The `safedelta` command."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from transformers.utils import logging

from safedelta_hf.cli.demo import DEMO_STRENGTH, run_demo
from safedelta_hf.cli.evaluate import evaluate
from safedelta_hf.errors import ConfigurationError, SafeDeltaError
from safedelta_hf.rules import RULES, SafeDelta
from safedelta_hf.testbed import CASES

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def safedelta() -> None:
    """Fine-tune an aligned language model and keep its refusals."""


@app.command()
def demo(
    case: Annotated[str, typer.Option(help=f"What to fine-tune on: {', '.join(CASES)}.")] = "benign",
    rule: Annotated[str, typer.Option(help=f"How to adjust: {', '.join(RULES)}.")] = SafeDelta.name,
    strength: Annotated[float, typer.Option(help="Strength of the rule.")] = DEMO_STRENGTH,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.", min=0, max=2**32 - 1)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for figure, figures and report.")] = Path("safedelta-demo"),
) -> None:
    """Fine-tune the tiny model that comes with the package, with the callback, and show what it does to refusals."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        chosen = _one_of(RULES, rule, "--rule")(strength=strength)
        run_demo(_one_of(CASES, case, "--case"), rule=chosen, seed=seed, output=output, echo=typer.echo)
    except SafeDeltaError as error:
        typer.echo(f"safedelta: {error}", err=True)
        sys.exit(1)


app.command("eval")(evaluate)


def _one_of(known: Mapping[str, T], name: str, option: str) -> T:
    if name not in known:
        raise ConfigurationError(f"{option} {name!r} is not one of {', '.join(known)}")
    return known[name]


if __name__ == "__main__":
    app()
