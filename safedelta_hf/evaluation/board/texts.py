"""A board as text: for a terminal, as Markdown, as plain values, and as JUnit's XML."""

from collections.abc import Container, Iterator, Sequence
from typing import Any, Final
from xml.etree import ElementTree

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from safedelta_hf.evaluation.board.gates import Verdict
from safedelta_hf.evaluation.board.paired import Difference
from safedelta_hf.evaluation.board.results import Board, meaning_of
from safedelta_hf.evaluation.result import Score, shown
from safedelta_hf.report.printing import INTERVAL, SCORE, Foldable, printed

SCORES: Final = "Scores, with 95 % intervals"
DIFFERENCES: Final = "Differences on the same prompts, with 95 % intervals"
DIFFERENCE_HEADS: Final = ("score", "compared", "difference", "p", "one alone / other alone")
PAIRED: Final = (
    "p is how often two models that do not differ would differ at least so much on these prompts: the exact McNemar "
    "test where each answer counts yes or no, else a permutation of signs. {count} tests were made, and p is not "
    "corrected for that: one in twenty falls below 0.05 by chance alone. The last column counts prompts on which "
    "the first of the two alone has it, and on which the second."
)


def cell(score: Score | None) -> str:
    """A score with its interval.

    Args:
        score: The score; None where it was not measured.

    Returns:
        Such as "12.0% (7.0% to 19.8%)".
    """
    if score is None:
        return "-"
    if score.low is None or score.high is None:
        return shown(score, score.value)
    return f"{shown(score, score.value)} ({shown(score, score.low)} to {shown(score, score.high)})"


def score_rows(board: Board) -> list[list[str]]:
    """Each score of each model.

    Args:
        board: The results.

    Returns:
        The name of a score, and a cell for each model.
    """
    return [[name, *(cell(one.scores.get(name)) for one in board.results)] for name in board.scores]


def difference_rows(board: Board, scores: Container[str] | None = None) -> list[list[str]]:
    """How the models differ.

    Where each answer counts yes or no, the last column has on how many prompts only the one model has it, on how many
    only the other, and of how many.

    Args:
        board: The results.
        scores: Which scores; None for all.

    Returns:
        A row for each difference, under `DIFFERENCE_HEADS`.
    """
    return [
        [
            one.score,
            f"{one.name} - {one.against}",
            _signed(one, board),
            "-" if one.p_value is None else "< 0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}",
            _parted(one),
        ]
        for one in board.differences
        if scores is None or one.score in scores
    ]


def explained(board: Board) -> str:
    """What p-values say, and of how many.

    Args:
        board: The results.

    Returns:
        A paragraph; empty where there was no test.
    """
    count = sum(one.p_value is not None for one in board.differences)
    return PAIRED.format(count=count) if count else ""


def verdict_line(verdict: Verdict, subject: str) -> str:
    """A verdict in a line.

    Args:
        verdict: The verdict.
        subject: Name of the result that is judged.

    Returns:
        Whether the result passed, the condition, and the figures that it met.
    """
    how = "FAILED" if verdict.fails else "passed"
    return f"{how}: {subject} fails if {verdict.condition} ({verdict.told})"


def table(board: Board, verdicts: Sequence[Verdict] = (), width: int | None = None) -> str:
    """The board for a terminal.

    Args:
        board: The results.
        verdicts: What the conditions say.
        width: Columns that it takes at most; None for those of the terminal, and where there is none, what it needs.

    Returns:
        Tables of all scores, and of differences in the chief ones; what else is to be known; a line for each condition.
    """
    parts: list[str | Table] = []
    for title, heads, rows in (
        (SCORES, ("score", *board.names), score_rows(board)),
        (DIFFERENCES, DIFFERENCE_HEADS, difference_rows(board, board.chief)),
    ):
        columns = (Column(head, overflow="fold") for head in heads)
        shown_table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        shown_table.collapse_padding, before = True, ""
        for name, *cells in rows:
            known = Foldable("" if name == before else name, SCORE)
            shown_table.add_row(known, *(Foldable(cell, INTERVAL) for cell in cells))
            before = name
        parts.append(shown_table)
    lines = (verdict_line(one, board.subject.name) for one in verdicts)
    return printed(*parts, explained(board), *board.notes, *lines, width=width)


def markdown(board: Board, verdicts: Sequence[Verdict] = ()) -> str:
    """The board as Markdown.

    Args:
        board: The results.
        verdicts: What the conditions say.

    Returns:
        The same as `table`, and what each score means.
    """
    rows = [[*row[:1], meaning_of(row[0]).title, *row[1:]] for row in score_rows(board)]
    parts = [
        *(f"* {verdict_line(one, board.subject.name)}" for one in verdicts),
        f"## {SCORES}",
        _joined(["score", "what it is", *board.names], rows),
        f"## {DIFFERENCES}",
        _joined(DIFFERENCE_HEADS, difference_rows(board)),
        explained(board),
        *board.notes,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def as_values(board: Board, verdicts: Sequence[Verdict] = ()) -> dict[str, Any]:
    """The board as plain values.

    Args:
        board: The results.
        verdicts: What the conditions say.

    Returns:
        A dictionary that JSON can hold; without the values prompt by prompt, which the results hold.
    """
    results = []
    for one in board.results:
        content = one.evaluation.to_dict()
        content.pop("values")
        results.append({"name": one.name, "path": str(one.path), **content})
    return {
        "subject": board.subject.name,
        "results": results,
        "differences": [vars(one) for one in board.differences],
        "gates": [vars(one) for one in verdicts],
        "notes": list(board.notes),
    }


def junit(board: Board, verdicts: Sequence[Verdict]) -> str:
    """The verdicts as JUnit's XML, which CI systems show as tests.

    Args:
        board: The results.
        verdicts: What the conditions say.

    Returns:
        A test suite with a test case for each condition.
    """
    failures = str(sum(one.fails for one in verdicts))
    suite = {"name": "safedelta board", "tests": str(len(verdicts)), "failures": failures, "errors": "0"}
    root = ElementTree.Element("testsuites", suite)
    cases = ElementTree.SubElement(root, "testsuite", suite)
    for one in verdicts:
        name = printable(f"not {one.condition}" if one.condition.isidentifier() else f"not ({one.condition})")
        case = ElementTree.SubElement(cases, "testcase", classname=f"safedelta.{board.subject.name}", name=name)
        if one.fails:
            line = printable(verdict_line(one, board.subject.name))
            ElementTree.SubElement(case, "failure", message=line).text = line
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def printable(text: str) -> str:
    """A text without what neither XML nor HTML can hold.

    Args:
        text: Any text, such as a model's response.

    Returns:
        The same, with a replacement character for control characters and lone surrogates.
    """
    return "".join(one if _is_shown(ord(one)) else "\ufffd" for one in text)


def _is_shown(code: int) -> bool:
    if code < 0x20:
        return code in (0x09, 0x0A, 0x0D)
    return not (0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or code in (0xFFFE, 0xFFFF))


def _signed(one: Difference, board: Board) -> str:
    unit = board[one.name].scores[one.score].unit
    ends = [] if one.low is None or one.high is None else [one.low, one.high]
    value, *interval = [f"{100 * x:+.1f}" if unit == "share" else f"{x:+.4g}" for x in (one.value, *ends)]
    points = f"{value} points" if unit == "share" else f"{value} {unit}"
    return f"{points} ({interval[0]} to {interval[1]})" if interval else points


def _parted(one: Difference) -> str:
    if one.more is None:
        return f"of {one.count}" if one.count else "-"
    return f"{one.more} / {one.fewer} of {one.count}"


def _joined(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_lines(heads, rows))


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (heads, ["---"] * len(heads), *rows):
        yield f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |"
