"""`safedelta demo`: what fine-tuning does to the refusals of a tiny model, and what the callback does."""

from pathlib import Path
from typing import Annotated

import typer

from safedelta_hf.cli.options import (
    CASE_NAMES,
    DEFAULT_RULE_HELP,
    RULE_HELP,
    STRENGTH_HELP,
    chosen_rule,
    one_line_errors,
    quieten_libraries,
    require_one_of,
)


def demo(
    case: Annotated[str, typer.Option(help=f"What to fine-tune on: {', '.join(CASE_NAMES)}.")] = "benign",
    rule: Annotated[str | None, typer.Option(help=f"{RULE_HELP} {DEFAULT_RULE_HELP}")] = None,
    strength: Annotated[str, typer.Option(help=STRENGTH_HELP)] = "auto",
    lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA on all linear layers.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.", min=0, max=2**32 - 1)] = 0,
    output: Annotated[Path, typer.Option(help="Folder for figure, figures and report.")] = Path("safedelta-demo"),
) -> None:
    """Fine-tune the tiny model that comes with the package, with the callback, and show what it does to refusals."""
    with one_line_errors():
        require_one_of(CASE_NAMES, case, "--case")
        chosen = chosen_rule(rule, strength, task=case)
        from safedelta_hf.testbed.data import CASES  # takes seconds
        from safedelta_hf.testbed.demo import run_demo

        quieten_libraries()
        run_demo(CASES[case], rule=chosen, seed=seed, output=output, echo=typer.echo, lora=lora)
