"""`safedelta apply`: adjust a saved adapter or a whole model, files to files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from safedelta_hf.adapter.files import adjust_adapter_files
from safedelta_hf.checkpoint.adjust import adjust_planned
from safedelta_hf.checkpoint.plan import plan_checkpoint
from safedelta_hf.cli.options import DEFAULT_RULE_HELP, RULE_HELP, chosen_rule, one_line_errors
from safedelta_hf.errors import ConfigurationError, OutputError
from safedelta_hf.records import Treatment
from safedelta_hf.report import Report

_OF_ADAPTER: Final = "A saved adapter"
_OF_MODEL: Final = "A whole model"


def apply(
    context: typer.Context,
    profile: Annotated[Path, typer.Option(help="Folder of the safety profile of the base.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter that PEFT saved.", rich_help_panel=_OF_ADAPTER)
    ] = None,
    initial_adapter: Annotated[
        Path | None,
        typer.Option(
            help="The adapter before training, if it was initialised from the base (PiSSA, ...).",
            rich_help_panel=_OF_ADAPTER,
        ),
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="Folder of the fine-tuned model, in safetensors.", rich_help_panel=_OF_MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, such as cuda; default cpu.", rich_help_panel=_OF_MODEL)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, from headers alone.", rich_help_panel=_OF_MODEL)
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model; of an adapter, the one that it names if left out.")
    ] = None,
    rule: Annotated[str | None, typer.Option(help=f"{RULE_HELP} {DEFAULT_RULE_HELP}")] = None,
    strength: Annotated[
        str | None, typer.Option(help="Strength of the rule: a number; may be left out where the rule has one itself.")
    ] = None,
    task_profile: Annotated[
        Path | None, typer.Option(help="Folder of a profile of the task data, for rules that weigh it.")
    ] = None,
    uncovered: Annotated[
        str, typer.Option(help="Tuned parameters that no rule covers: error, keep (as tuned) or reset (to the base).")
    ] = "error",
    report: Annotated[Path | None, typer.Option(help="File for the whole report, as JSON.")] = None,
) -> None:
    """Adjust a saved adapter (--adapter) or a model (--base and --tuned), files to files."""
    with one_line_errors():
        given = context.params
        _require_one_kind(given)
        _require_place(report)
        chosen = chosen_rule(rule, strength, task_profile)
        treatment = Treatment(uncovered=cast(Any, uncovered))
        if adapter is not None:
            done = adjust_adapter_files(
                adapter,
                profile=profile,
                output=output,
                rule=chosen,
                task_profile=task_profile,
                base=base,
                initial_adapter=initial_adapter,
                treatment=treatment,
            )
            _finish(done, output, report)
            return
        assert base is not None and tuned is not None, "one kind is given, whole"
        plan = plan_checkpoint(
            base=base,
            tuned=tuned,
            output=output,
            profile=profile,
            rule=chosen,
            task_profile=task_profile,
            treatment=treatment,
        )
        if dry_run:
            typer.echo(plan.table())
            return
        if plan.left_out:
            typer.echo(f"Not copied: {', '.join(plan.left_out)}")
        _finish(adjust_planned(plan, device=device or "cpu"), output, report)


def _require_one_kind(given: Mapping[str, Any]) -> None:
    if (given["adapter"] is None) == (given["tuned"] is None):
        raise ConfigurationError("give --adapter for an adapter, or --base and --tuned for a whole model")
    if given["adapter"] is None and given["base"] is None:
        raise ConfigurationError("--tuned needs --base, the model that the fine-tuning started from")
    own, kind = (
        (("tuned", "device", "dry_run"), "--tuned") if given["tuned"] is None else (("initial_adapter",), "--adapter")
    )
    if strangers := [name for name in own if given[name]]:
        options = ", ".join("--" + name.replace("_", "-") for name in strangers)
        raise ConfigurationError(f"{options}: only with {kind}")


def _require_place(report: Path | None) -> None:
    # An adjustment takes hours, and its report is written last.
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise ConfigurationError(f"--report {str(report)!r}: is a folder, or in one that does not exist; name a file")


def _finish(done: Report, output: Path, report: Path | None) -> None:
    typer.echo(done.summary())
    typer.echo(f"Written: {output}")
    if report is not None:
        try:
            done.save(report)
        except OutputError as error:
            raise OutputError(f"--report: {error}; {str(output)!r} is complete without it") from error
