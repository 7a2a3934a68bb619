"""`safedelta refusals`: safety data for a model of the user's, from its own answers."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from safedelta_hf.cli.options import one_line_errors, quieten_libraries
from safedelta_hf.data.prompt_sets import PROMPT_SETS
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.folders import require_writable
from safedelta_hf.report.printing import printed, written

if TYPE_CHECKING:
    from safedelta_hf.evaluation.questions import Prompt
    from safedelta_hf.evaluation.refusals import Answers

API_KEY: Final = "OPENAI_API_KEY"
MAX_NEW_TOKENS: Final = 64


def refusals(
    model: Annotated[str, typer.Option(help="Name or folder of the aligned model; with --server, its name there.")],
    prompts: Annotated[
        list[str],
        typer.Option(help=f"File of harmful prompts, or the name of a set: {', '.join(PROMPT_SETS)}. May be repeated."),
    ],
    output: Annotated[Path, typer.Option(help="File of JSON lines to write; must not exist. A killed run goes on.")],
    server: Annotated[
        str | None, typer.Option(help=f"Address of an OpenAI-compatible server (vLLM); its key in ${API_KEY}.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask this many prompts, at most.", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer, in tokens.", min=1)] = MAX_NEW_TOKENS,
    batch_size: Annotated[int, typer.Option(help="Prompts per forward pass, or requests at once.", min=1)] = 8,
) -> None:
    """Ask a model harmful prompts, and keep what it refuses as safety data."""  # noqa: DOC501 - ends in one line
    with one_line_errors():
        if output.exists():
            raise ConfigurationError(f"--output {str(output)!r} exists; choose another, or remove it")
        _require_prompts(prompts)
        require_writable(output)
        from safedelta_hf.evaluation.refusals import collect_refusals, write_rows  # takes seconds

        quieten_libraries(bars=False)
        asked = _prompts(prompts)[:limit]
        answers = _answers(model, server, max_new_tokens, batch_size)
        log = output.with_name(f"{output.name}.answers.jsonl")
        found = collect_refusals(answers, asked, log=log)
        if not found.rows:
            raise ConfigurationError(
                f"{model} refused none of {found.asked} prompts, so there is nothing to protect; answers: {log}"
            )
        write_rows(found.rows, output)
        share = found.share
        interval = f"95 % interval {share.low:.1%} to {share.high:.1%}"
        told = f"{len(found.rows)} of {found.asked} refused ({share.value:.1%}, {interval})"
        typer.echo(printed(told), nl=False)
        if found.warning:
            typer.echo(f"Warning: {found.warning}.", err=True)
        typer.echo(written(output, log))


def _require_prompts(names: list[str]) -> None:
    for name in names:
        is_word = "/" not in name and "." not in name
        if is_word and name not in PROMPT_SETS and not Path(name).exists():
            raise ConfigurationError(f"--prompts {name!r} is no file, and no set: {', '.join(PROMPT_SETS)}")


def _prompts(names: list[str]) -> "list[Prompt]":
    from safedelta_hf.evaluation.questions import read_prompts  # takes seconds

    found: dict[str, Prompt] = {}
    for name in names:
        rows = PROMPT_SETS[name].prompts() if name in PROMPT_SETS else name
        found |= {prompt.text: prompt for prompt in read_prompts(rows, "--prompts")}
    return list(found.values())


def _answers(model: str, server: str | None, max_new_tokens: int, batch_size: int) -> "Answers":
    from safedelta_hf.evaluation.refusals import ModelAnswers, ServerAnswers  # takes seconds
    from safedelta_hf.modules.loading import load_model

    if server is not None:
        key = os.environ.get(API_KEY)
        return ServerAnswers(server, model, max_new_tokens=max_new_tokens, requests=batch_size, api_key=key)
    loaded, tokenizer = load_model(model, "--model")
    return ModelAnswers(loaded, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size)
