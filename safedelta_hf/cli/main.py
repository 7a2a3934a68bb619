"""The `safedelta` command."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from transformers.utils import logging

from safedelta_hf.cli.demo import run_demo
from safedelta_hf.errors import ConfigurationError, SafeDeltaError
from safedelta_hf.pipeline import adjust_adapter_files
from safedelta_hf.rules import RULES, SafeDelta
from safedelta_hf.testbed import CASES

T = TypeVar("T")

PUBLISHED_STRENGTH = 0.1
"""That of the paper, for the published rule."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def safedelta() -> None:
    """Fine-tune an aligned language model and keep its refusals."""


@app.command()
def demo(
    case: Annotated[str, typer.Option(help=f"What to fine-tune on: {', '.join(CASES)}.")] = "benign",
    rule: Annotated[str, typer.Option(help=f"How to adjust: {', '.join(RULES)}.")] = SafeDelta.name,
    strength: Annotated[str, typer.Option(help="Strength of the rule: a number, or 'auto' to measure.")] = "auto",
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA on all linear layers.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.", min=0, max=2**32 - 1)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for figure, figures and report.")] = Path("safedelta-demo"),
) -> None:
    """Fine-tune the tiny model that comes with the package, with the callback, and show what it does to refusals."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with _errors_in_one_line():
        chosen = _one_of(RULES, rule, "--rule")(strength=_strength(strength))
        chosen_case = _one_of(CASES, case, "--case")
        run_demo(chosen_case, rule=chosen, seed=seed, output=output, echo=typer.echo, lora=lora)


@app.command()
def apply(
    adapter: Annotated[Path, typer.Option(help="Folder of a LoRA adapter that PEFT saved.")],
    profile: Annotated[Path, typer.Option(help="Folder of the safety profile of its base.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    rule: Annotated[str, typer.Option(help=f"How to adjust: {', '.join(RULES)}.")] = SafeDelta.name,
    strength: Annotated[float, typer.Option(help="Strength of the rule.")] = PUBLISHED_STRENGTH,
    base: Annotated[str | None, typer.Option(help="Base model, for whole parameters that the adapter carries.")] = None,
    initial_adapter: Annotated[
        Path | None, typer.Option(help="The adapter before training, if it was initialised from the base (PiSSA, ...).")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="File for the whole report, as JSON.")] = None,
) -> None:
    """Adjust a saved adapter, files to files, without its base model."""
    with _errors_in_one_line():
        done = adjust_adapter_files(
            adapter,
            profile=profile,
            output=output,
            rule=_one_of(RULES, rule, "--rule")(strength=strength),
            base=base,
            initial_adapter=initial_adapter,
        )
        if report is not None:
            done.save(report)
        typer.echo(done.summary())
        typer.echo(f"Written: {output}")


def _strength(value: str) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(f"--strength {value!r} is neither a number nor 'auto'") from None


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except SafeDeltaError as error:
        typer.echo(f"safedelta: {error}", err=True)
        sys.exit(1)


def _one_of(known: Mapping[str, T], name: str, option: str) -> T:
    if name not in known:
        raise ConfigurationError(f"{option} {name!r} is not one of {', '.join(known)}")
    return known[name]


if __name__ == "__main__":
    app()
