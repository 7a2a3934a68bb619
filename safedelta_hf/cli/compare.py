"""`safedelta compare`: rules, strengths and baselines, on the testbed's cases or on one model of the user's."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers.utils import logging

from safedelta_hf.cli.errors import one_line_errors
from safedelta_hf.cli.models import FilesSubject
from safedelta_hf.cli.options import RULE_HELP, one_of
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation import model_digest
from safedelta_hf.evaluation.comparison import ComparisonFile, Subject, compare, draw, enter, markdown
from safedelta_hf.rules import RULES
from safedelta_hf.testbed import CASES
from safedelta_hf.testbed.comparison import UTILITIES, AlignedModel, CaseSubject

TABLE, PLOT = "comparison.md", "comparison.png"

QUESTIONS = 200
RETENTION = 0.1
SEEDS = (0, 1, 2)

_TESTBED = "Testbed"
_OWN = "A model of your own"


def comparison(
    output: Annotated[Path, typer.Option(help="Folder for results.json, table and plot; a killed run goes on there.")],
    rule: Annotated[list[str] | None, typer.Option(help=f"{RULE_HELP} May be repeated; default all.")] = None,
    strength: Annotated[
        list[str] | None,
        typer.Option(help="A number, or 'auto'. May be repeated; default 'auto' and a grid over each rule's range."),
    ] = None,
    retention: Annotated[
        float | None,
        typer.Option(help=f"Weight of ordinary data, compared with none; default {RETENTION:g}, 0 for none.", min=0),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(CASES)}. May be repeated; default all.", rich_help_panel=_TESTBED),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="May be repeated; default 0, 1, 2.", min=0, max=2**32 - 1, rich_help_panel=_TESTBED),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help=f"Of each kind; default {QUESTIONS}.", min=1, rich_help_panel=_TESTBED)
    ] = None,
    base: Annotated[str | None, typer.Option(help="Folder of the base model.", rich_help_panel=_OWN)] = None,
    tuned: Annotated[str | None, typer.Option(help="Folder of the fine-tuned model.", rich_help_panel=_OWN)] = None,
    safety_data: Annotated[
        Path | None, typer.Option(help="Harmful prompts with refusals, for the profile.", rich_help_panel=_OWN)
    ] = None,
    harmful: Annotated[
        Path | None, typer.Option(help="Requests that should be refused, to ask.", rich_help_panel=_OWN)
    ] = None,
    benign: Annotated[
        Path | None, typer.Option(help="Requests that only look harmful, to ask.", rich_help_panel=_OWN)
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="Questions of the task; needs --score.", rich_help_panel=_OWN)
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="module:function of (response, row), from 0 to 1.", rich_help_panel=_OWN)
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Examples of the fine-tuning data, for the profile.", rich_help_panel=_OWN)
    ] = None,
    ordinary_data: Annotated[
        Path | None, typer.Option(help="Ordinary prompts with the base's responses.", rich_help_panel=_OWN)
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length limit of a response; default 128.", min=1, rich_help_panel=_OWN)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts per forward pass; default 8.", min=1, rich_help_panel=_OWN)
    ] = None,
) -> None:
    """Compare rules over strengths, and baselines: attack success against utility, as JSON, table and plot.

    Without --base and --tuned on the testbed: each case is fine-tuned with each seed.
    """
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    on_testbed: Mapping[str, Any] = {"--case": case, "--seed": seed, "--questions": questions}
    own: Mapping[str, Any] = {
        "--base": base,
        "--tuned": tuned,
        "--safety-data": safety_data,
        "--harmful": harmful,
        "--benign": benign,
        "--task": task,
        "--score": score,
        "--task-data": task_data,
        "--ordinary-data": ordinary_data,
        "--max-new-tokens": max_new_tokens,
        "--batch-size": batch_size,
    }
    with one_line_errors():
        names = [one_of(RULES, name, "--rule") and name for name in rule or RULES]
        is_own = any(value is not None for value in own.values())
        _refuse_both(on_testbed, is_own)
        if is_own:
            _run_own(own, names, strength, retention, output)
        else:
            _run_testbed(case, seed, questions or QUESTIONS, names, strength, retention, output)


def _refuse_both(on_testbed: Mapping[str, Any], is_own: bool) -> None:
    given = [name for name, value in on_testbed.items() if value is not None]
    if given and is_own:
        raise ConfigurationError(f"{', '.join(given)}: on the testbed alone; a model of your own is given by --base")


def _run_testbed(
    cases: Sequence[str] | None,
    seeds: Sequence[int] | None,
    questions: int,
    names: Sequence[str],
    strengths: Sequence[str] | None,
    retention: float | None,
    output: Path,
) -> None:
    chosen = [one_of(CASES, name, "--case") for name in dict.fromkeys(cases or CASES)]
    weights = _retentions(retention, has_ordinary=True)
    entrants = enter(names, strengths, weights, has_task=True)
    aligned = AlignedModel()
    made_with = {"aligned": model_digest(aligned.model, aligned.tokenizer), "questions": questions}
    file = ComparisonFile(output, made_with=made_with, utilities=UTILITIES, command=_command())
    subjects = [
        CaseSubject(aligned, case, seed, questions) for case in chosen for seed in dict.fromkeys(seeds or SEEDS)
    ]
    _finish(subjects, entrants, file, output)


def _run_own(
    own: Mapping[str, Any],
    names: Sequence[str],
    strengths: Sequence[str] | None,
    retention: float | None,
    output: Path,
) -> None:
    missing = [name for name in ("--base", "--tuned", "--safety-data", "--harmful") if own[name] is None]
    if missing:
        raise ConfigurationError(f"{', '.join(missing)}: needed to compare rules on a model of your own")
    weights = _retentions(retention, has_ordinary=own["--ordinary-data"] is not None)
    entrants = enter(names, strengths, weights, has_task=own["--task-data"] is not None)
    subject = FilesSubject(**{name.removeprefix("--").replace("-", "_"): value for name, value in own.items()})
    file = ComparisonFile(output, made_with=subject.made_with, utilities={"task_accuracy": "gain"}, command=_command())
    _finish([subject], entrants, file, output)


def _finish(subjects: Sequence[Subject], entrants: Any, file: ComparisonFile, output: Path) -> None:  # noqa: ANN401
    for name, reason in entrants.left_out.items():
        typer.echo(f"{name} takes no part: {reason}")
    compare(subjects, entrants, file)
    text = markdown(file)
    (output / TABLE).write_text(text, encoding="utf-8")
    draw(file, output / PLOT)
    typer.echo(text)
    typer.echo(f"Written: {output}/results.json, {TABLE}, {PLOT}")


def _retentions(given: float | None, *, has_ordinary: bool) -> list[float]:
    if given and not has_ordinary:
        raise ConfigurationError("--retention has no effect without --ordinary-data")
    weight = given if given is not None else RETENTION if has_ordinary else 0.0
    return [0.0, weight] if weight else [0.0]


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
