"""`safedelta board`: evaluations side by side, for people who decide and for pipelines that stop."""

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from safedelta_hf.cli.options import one_line_errors
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.board import Board, Verdict, figure, judged, page, texts
from safedelta_hf.evaluation.result import RESULTS
from safedelta_hf.folders import complete_file, write_whole
from safedelta_hf.report.printing import written

FAILED: Final = 3
"""Exit status where a condition of --fail-if holds."""

FILES: Final = ("board.html", "board.md", "board.json", "board.png")
JUNIT: Final = "junit.xml"


def board(
    results: Annotated[
        list[str],
        typer.Argument(
            help="Folders or results files of `safedelta eval`, as NAME=PATH or PATH; the first is what others are "
            "measured against, such as the aligned model."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help=f"Folder to write to: {', '.join(FILES)}, and {JUNIT} with --fail-if. Files are replaced."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="Name of the result that is judged; default the last.")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help=f'Exit with status {FAILED} if this holds, such as "attack_success > aligned + 0.05". May be repeated.'
        ),
    ] = None,
    examples: Annotated[
        int, typer.Option(help="Prompts of each kind in the page on which answers differ, at most.", min=0)
    ] = page.EXAMPLES,
) -> None:
    """Put evaluations side by side: tables with paired tests, a page for a review board, conditions to fail by."""  # noqa: DOC501 - a status
    with one_line_errors():
        shown = Board.read(_named(results), subject)
        verdicts = [judged(condition, shown) for condition in fail_if or ()]
        typer.echo(texts.table(shown, verdicts), nl=False)
        if output is not None:
            typer.echo(written(*_write(output, shown, verdicts, examples)))
    if any(one.fails for one in verdicts):
        raise typer.Exit(FAILED)


def _named(results: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in results:
        name, sign, path = text.partition("=")
        if not sign or Path(text).exists():
            place = Path(text).resolve()
            name, path = _usual_name(place.parent if place.name == RESULTS else place), text
        if name in found:
            raise ConfigurationError(f"two results are called {name!r}; name them, as in aligned={path}")
        found[name] = Path(path)
    return found


def _usual_name(place: Path) -> str:
    # As a gate can spell it.
    return "".join(one if one.isascii() and one.isalnum() else "_" for one in place.name.removesuffix(".json"))


def _write(output: Path, shown: Board, verdicts: list[Verdict], examples: int) -> list[Path]:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output {str(output)!r} is no folder and cannot be made one ({error})") from error
    html, markdown, values, picture = (output / name for name in FILES)
    write_whole(markdown, texts.printable(texts.markdown(shown, verdicts)))
    write_whole(values, json.dumps(texts.as_values(shown, verdicts), indent=1))
    write_whole(html, page.page(shown, verdicts, examples=examples))
    with complete_file(picture) as part:
        part.write_bytes(figure.png(shown))
    if not verdicts:
        return [html, markdown, values, picture]
    write_whole(output / JUNIT, texts.junit(shown, verdicts))
    return [html, markdown, values, picture, output / JUNIT]
