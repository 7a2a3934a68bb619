"""The `safedelta` command."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging

from safedelta_hf.cli.compare import comparison
from safedelta_hf.cli.demo import run_demo
from safedelta_hf.cli.errors import one_line_errors
from safedelta_hf.cli.evaluate import evaluate
from safedelta_hf.cli.options import RULE_HELP, STRENGTH_HELP, chosen_rule, one_of
from safedelta_hf.cli.profile import profile
from safedelta_hf.pipeline import adjust_adapter_files
from safedelta_hf.rules import SafeDelta, TaskRidge
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


@app.command()
def apply(
    adapter: Annotated[Path, typer.Option(help="Folder of a LoRA adapter that PEFT saved.")],
    profile: Annotated[Path, typer.Option(help="Folder of the safety profile of its base.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    rule: Annotated[str, typer.Option(help=RULE_HELP)] = SafeDelta.name,
    strength: Annotated[
        str | None, typer.Option(help="Strength of the rule, a number; its own default if none.")
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="Folder of a profile of the task data, for rules that weigh it.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, for whole parameters that the adapter carries.")] = None,
    initial_adapter: Annotated[
        Path | None, typer.Option(help="The adapter before training, if it was initialised from the base (PiSSA, ...).")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="File for the whole report, as JSON.")] = None,
) -> None:
    """Adjust a saved adapter, files to files, without its base model."""
    with one_line_errors():
        done = adjust_adapter_files(
            adapter,
            profile=profile,
            output=output,
            rule=chosen_rule(rule, strength),
            task=task,
            base=base,
            initial_adapter=initial_adapter,
        )
        if report is not None:
            done.save(report)
        typer.echo(done.summary())
        typer.echo(f"Written: {output}")


app.command("profile")(profile)
app.command("eval")(evaluate)
app.command("compare")(comparison)


if __name__ == "__main__":
    app()
