"""`safedelta apply`: adjust a saved adapter or a whole model, files to files."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.cli.options import (
    DEFAULT_RULE_HELP,
    ORDINARY_WEIGHT,
    ORDINARY_WEIGHT_HELP,
    RULE_HELP,
    SAFETY_DATA_HELP,
    SORT_TASK_HELP,
    STRENGTH_HELP,
    chosen_rule,
    one_line_errors,
    quieten_libraries,
)
from safedelta_hf.cli.reading import (
    BatchSize,
    Holdout,
    MaxLength,
    MomentMemory,
    OffloadFolder,
    ShareMoments,
    Targets,
    reading_config,
)
from safedelta_hf.errors import ConfigurationError, OutputError
from safedelta_hf.records.plan import Treatment
from safedelta_hf.report import Report
from safedelta_hf.report.printing import printed, written

if TYPE_CHECKING:
    from safedelta_hf.rules import Rule

_DATA: Final = "What is read with the base"
_PROFILES: Final = "Profiles made before, instead"


def _data(text: str, **settings: Any) -> Any:  # noqa: ANN401 - what Annotated takes
    return typer.Option(help=text, rich_help_panel=_DATA, **settings)


def _profile(text: str) -> Any:  # noqa: ANN401 - what Annotated takes
    return typer.Option(help=text, rich_help_panel=_PROFILES)


def apply(
    tuned: Annotated[
        Path,
        typer.Option(
            "--tuned", "--adapter", help="Folder of the fine-tuned model, in safetensors, or of a LoRA that PEFT saved."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    base: Annotated[
        str | None,
        typer.Option(help="The model that was fine-tuned; of an adapter, the one that it names if left out."),
    ] = None,
    safety_data: Annotated[Path | None, _data(SAFETY_DATA_HELP)] = None,
    task_data: Annotated[Path | None, _data("The fine-tuning data, for rules that weigh the task.")] = None,
    ordinary_data: Annotated[
        Path | None, _data("Ordinary prompts with the base's responses, to protect as well.")
    ] = None,
    ordinary_weight: Annotated[float | None, _data(ORDINARY_WEIGHT_HELP)] = None,
    task_examples: Annotated[int, _data("Rows to draw of --task-data, at most.", min=1)] = 256,
    sort_task: Annotated[bool, _data(SORT_TASK_HELP)] = True,
    save_profile: Annotated[
        Path | None, _data("Folder to keep the safety profile in, for other fine-tunes of this base.")
    ] = None,
    profile: Annotated[Path | None, _profile("Folder of a safety profile of the base (safedelta profile).")] = None,
    task_profile: Annotated[Path | None, _profile("Folder of a profile of the task data.")] = None,
    ordinary_profile: Annotated[
        Path | None, _profile("Folder of a profile of ordinary data, to protect as well.")
    ] = None,
    batch_size: BatchSize = ProfileConfig.batch_size,
    max_length: MaxLength = None,
    holdout: Holdout = None,
    targets: Targets = None,
    share_moments: ShareMoments = True,
    moment_memory: MomentMemory = None,
    offload_folder: OffloadFolder = None,
    rule: Annotated[str | None, typer.Option(help=f"{RULE_HELP} {DEFAULT_RULE_HELP}")] = None,
    strength: Annotated[
        str | None, typer.Option(help=f"{STRENGTH_HELP} Default: what the rule has, mostly auto.")
    ] = None,
    initial_adapter: Annotated[
        Path | None,
        typer.Option(help="The adapter before training, if it was initialised from the base (PiSSA, ...)."),
    ] = None,
    uncovered: Annotated[
        str, typer.Option(help="Tuned parameters that no rule covers: error, keep (as tuned) or reset (to the base).")
    ] = "error",
    device: Annotated[str, typer.Option(help="Device, or device map of transformers: cpu, cuda:0, auto, ...")] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan for a model, from headers alone; needs --profile where the rule does."
        ),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="File for the whole report, as JSON.")] = None,
) -> None:
    """Adjust a fine-tuned model or adapter in its folder.

    Reads data with the base, measures the strength in memory, and writes the output files to files.
    """  # noqa: DOC501 - ends in one line
    with one_line_errors():
        _require_place(report)
        if ordinary_weight is not None and ordinary_data is None and ordinary_profile is None:
            raise ConfigurationError("--ordinary-weight has no effect without --ordinary-data or --ordinary-profile")
        config = reading_config(
            batch_size=batch_size,
            max_length=max_length,
            holdout=holdout,
            targets=targets,
            share_moments=share_moments,
            moment_memory=moment_memory,
            offload_folder=offload_folder,
        )
        _require_effect(config, safety_data, task_data, ordinary_data)
        task = task_data if task_profile is None else task_profile
        chosen, treatment = chosen_rule(rule, strength, task), Treatment(uncovered=cast(Any, uncovered))
        quieten_libraries()
        if dry_run:
            if base is None or (profile is None and chosen.needs_safety_data):
                raise ConfigurationError("--dry-run needs --base and --profile, and the --tuned of a whole model")
            typer.echo(_plan(base, tuned, output, profile, task_profile, chosen, treatment))
            return
        from safedelta_hf.saved.adjust import adjust_saved  # takes seconds

        done = adjust_saved(
            tuned=tuned,
            output=output,
            base=base,
            safety_dataset=safety_data,
            profile=profile,
            task_dataset=task_data,
            task_profile=task_profile,
            ordinary_dataset=ordinary_data,
            ordinary_profile=ordinary_profile,
            ordinary_weight=ORDINARY_WEIGHT if ordinary_weight is None else ordinary_weight,
            task_examples=task_examples,
            sort_task=sort_task,
            rule=chosen,
            config=None if config == ProfileConfig() else config,
            treatment=treatment,
            initial_adapter=initial_adapter,
            save_profile=save_profile,
            device=device,
        )
        if left_out := sorted(path.name for path in tuned.iterdir() if not (output / path.name).exists()):
            typer.echo(printed(f"Not copied: {', '.join(left_out)}"), nl=False)
        _finish(done, output, report)


def _plan(
    base: str,
    tuned: Path,
    output: Path,
    profile: Path | None,
    task_profile: Path | None,
    rule: "Rule",
    treatment: Treatment,
) -> str:
    from safedelta_hf.checkpoint.plan import plan_checkpoint  # takes seconds

    how: dict[str, Any] = {"rule": rule, "task_profile": task_profile, "treatment": treatment}
    return plan_checkpoint(base=base, tuned=tuned, output=output, profile=profile, **how).table()


def _require_effect(config: ProfileConfig, safety_data: Path | None, *other_data: Path | None) -> None:
    if config.holdout is not None and safety_data is None:
        raise ConfigurationError("--holdout has no effect without --safety-data")
    given = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    if given and safety_data is None and not any(other_data):
        told = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigurationError(f"{told}: has no effect where no data is read")


def _require_place(report: Path | None) -> None:
    # An adjustment takes hours, and its report is written last.
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise ConfigurationError(f"--report {str(report)!r}: is a folder, or in one that does not exist; name a file")


def _finish(done: Report, output: Path, report: Path | None) -> None:
    typer.echo(printed(done.summary()), nl=False)
    typer.echo(written(output))
    if report is not None:
        try:
            done.save(report)
        except OutputError as error:
            raise OutputError(f"--report: {error}; {str(output)!r} is complete without it") from error
