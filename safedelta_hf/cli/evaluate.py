"""`safedelta eval`: measure how a model behaves, from files to files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safedelta_hf.cli.options import GUARD_NAMES, is_dotted, load_function, one_line_errors, quieten_libraries
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.result import RESULTS
from safedelta_hf.report.printing import written

if TYPE_CHECKING:
    from safedelta_hf.evaluation import HarnessTasks, Judge, Reference


def evaluate(
    model: Annotated[str, typer.Option(help="Name or folder of the model, or of a PEFT adapter.")],
    output: Annotated[Path, typer.Option(help=f"Folder for {RESULTS} and the responses; a killed run goes on there.")],
    adapter: Annotated[str | None, typer.Option(help="Name or folder of a PEFT adapter on the model.")] = None,
    harmful: Annotated[Path | None, typer.Option(help="Requests that should be refused.")] = None,
    benign: Annotated[Path | None, typer.Option(help="Requests that look harmful and should not be refused.")] = None,
    refusals: Annotated[Path | None, typer.Option(help="Prompts with the refusals whose likelihood counts.")] = None,
    task_questions: Annotated[Path | None, typer.Option(help="Questions of your task; needs --score.")] = None,
    score: Annotated[str | None, typer.Option(help="module:function of (response, row), from 0 to 1.")] = None,
    judge: Annotated[
        str | None,
        typer.Option(help='A model that answers "safe" or "unsafe", or module:function of (prompt, response).'),
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(
            help=f"How to read a verdict off the likelihoods of the --judge's labels: {', '.join(GUARD_NAMES)}."
        ),
    ] = None,
    guard_template: Annotated[
        Path | None, typer.Option(help="File with what a --guard is shown, with {prompt} and {response}.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model that tells language from gibberish: the base.")] = None,
    coherence_limit: Annotated[
        float | None, typer.Option(help="Median nats per token of a coherent response under --base, at most.", min=0)
    ] = None,
    lm_eval: Annotated[str | None, typer.Option(help="Tasks of lm_eval, separated by commas.")] = None,
    lm_eval_include: Annotated[Path | None, typer.Option(help="Folder with lm_eval task files of your own.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Examples per lm_eval task, at most.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of a response, in tokens.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts or responses per forward pass.", min=1)] = 8,
) -> None:
    """Measure what a model refuses, what it should not refuse, and what it can do.

    A prompts file has one prompt per line: {"messages": [...]}, {"prompt": "..."} or plain text.
    """
    with one_line_errors():
        from safedelta_hf.evaluation import Questions, evaluate_model  # takes seconds
        from safedelta_hf.modules.loading import load_model

        quieten_libraries(bars=False)
        # Everything that is small is read before anything that is large.
        questions = Questions.read(
            harmful=harmful,
            benign=benign,
            refusals=refusals,
            task=task_questions,
            score=None if score is None else load_function(score, "--score"),
            judge=_judge(judge, guard, guard_template, batch_size),
            harness=_harness(lm_eval, lm_eval_include, lm_eval_limit),
        )
        reference = _reference(base, coherence_limit)
        loaded, tokenizer = load_model(model, "--model", adapter=adapter)
        evaluation = evaluate_model(
            loaded,
            tokenizer,
            questions,
            reference=reference,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            output=output,
        )
        typer.echo(evaluation.table(), nl=False)
        typer.echo(written(output / RESULTS, *sorted(output.glob("*.jsonl"))))


def _harness(tasks: str | None, include: Path | None, limit: int | None) -> "HarnessTasks | None":
    if tasks is None:
        if include is not None or limit is not None:
            raise ConfigurationError("--lm-eval-include and --lm-eval-limit have no effect without --lm-eval")
        return None
    from safedelta_hf.evaluation import HarnessTasks  # takes seconds

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    return HarnessTasks(names=names, include=include, limit=limit)


def _judge(name: str | None, guard: str | None, template: Path | None, batch_size: int) -> "Judge | None":
    from safedelta_hf.evaluation import Guard, ModelJudge  # takes seconds

    if guard is None and template is not None:
        raise ConfigurationError("--guard-template has no effect without --guard; say how the guard is asked")
    if guard is not None:
        if name is None or is_dotted(name):
            raise ConfigurationError("--guard says how a guard model is asked; name the model with --judge")
        return Guard(
            name,
            preset=guard,
            template=None if template is None else _text(template),
            batch_size=batch_size,
        )
    if name is None:
        return None
    return load_function(name, "--judge") if is_dotted(name) else ModelJudge(name, batch_size=batch_size)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--guard-template {str(path)!r} cannot be read ({error})") from error


def _reference(base: str | None, limit: float | None) -> "Reference | None":
    from safedelta_hf.evaluation import Reference  # takes seconds
    from safedelta_hf.modules.loading import load_model

    if base is None and limit is not None:
        raise ConfigurationError("--coherence-limit has no effect without --base; give the base model too")
    return None if base is None else Reference(*load_model(base, "--base"), limit)
