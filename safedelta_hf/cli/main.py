"""The `safedelta` command."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from safedelta_hf.cli.apply import apply
from safedelta_hf.cli.compare import comparison
from safedelta_hf.cli.demo import run_demo
from safedelta_hf.cli.evaluate import evaluate
from safedelta_hf.cli.options import RULE_HELP, STRENGTH_HELP, chosen_rule, one_line_errors, one_of
from safedelta_hf.cli.profile import profile
from safedelta_hf.rules import TaskRidge
from safedelta_hf.testbed import CASES

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def safedelta() -> None:
    """Fine-tune an aligned language model and keep its refusals."""


@app.command()
def demo(
    case: Annotated[str, typer.Option(help=f"What to fine-tune on: {', '.join(CASES)}.")] = "benign",
    rule: Annotated[str, typer.Option(help=RULE_HELP)] = TaskRidge.name,
    strength: Annotated[str, typer.Option(help=STRENGTH_HELP)] = "auto",
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA on all linear layers.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.", min=0, max=2**32 - 1)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for figure, figures and report.")] = Path("safedelta-demo"),
) -> None:
    """Fine-tune the tiny model that comes with the package, with the callback, and show what it does to refusals."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with one_line_errors():
        chosen, chosen_case = chosen_rule(rule, strength), one_of(CASES, case, "--case")
        run_demo(chosen_case, rule=chosen, seed=seed, output=output, echo=typer.echo, lora=lora)


app.command("profile")(profile)
app.command("apply")(apply)
app.command("eval")(evaluate)
app.command("compare")(comparison)


if __name__ == "__main__":
    app()
