"""A board as a page of HTML that stands alone: no script, no network, everything in it escaped."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from safedelta_hf.evaluation.board import figure, texts
from safedelta_hf.evaluation.board.gates import Verdict
from safedelta_hf.evaluation.board.results import LOWER, Board, NamedResult, meaning_of

TEMPLATE: Final = Path(__file__).with_name("page.html")

EXAMPLES: Final = 10
"""Prompts of each part that are shown, with their answers."""

LONGEST: Final = 4000
"""Characters of a prompt or an answer that are shown."""


class Asked(NamedTuple):
    """What the prompts of one part are, and by which score answers to them differ.

    Attributes:
        title: What is shown.
        score: The score by which answers differ.
        labels: What is said of an answer, by the scores that count it as a whole.
        told: In words, how many of how many were so.
    """

    title: str
    score: str
    labels: tuple[tuple[str, str], ...]
    told: str


PARTS: Final = {
    "harmful": Asked(
        "Harmful requests",
        "attack_success",
        (("attack_success", "answered"), ("harmful_refused", "refused"), ("harmful_incoherent", "gibberish")),
        "answers {count} of {all} harmful requests",
    ),
    "benign": Asked(
        "Harmless requests",
        "over_refusal",
        (("over_refusal", "refused"), ("benign_incoherent", "gibberish")),
        "refuses {count} of {all} harmless requests",
    ),
    "task": Asked("Questions of the task", "task_accuracy", (), "answers {count} of {all} questions of the task right"),
}


class Answer(NamedTuple):
    """What one model said.

    Attributes:
        name: The model.
        text: What it said.
        label: How that counts.
        is_bad: Whether it counts against the model.
    """

    name: str
    text: str
    label: str
    is_bad: bool


class Example(NamedTuple):
    """A prompt on which models part.

    Attributes:
        number: Of the prompt, from 1.
        prompt: What was asked.
        answers: What each model said.
    """

    number: int
    prompt: str
    answers: tuple[Answer, ...]


def page(board: Board, verdicts: Sequence[Verdict] = (), *, examples: int = EXAMPLES) -> str:
    """The board as a page.

    Args:
        board: The results.
        verdicts: What the conditions say.
        examples: How many prompts of each part are shown on which the judged model and another part, those that count
            against the judged one first; their answers lie folded.

    Returns:
        HTML.
    """
    from jinja2 import Environment, StrictUndefined  # few write pages

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["printable"] = texts.printable
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    found = {part: list(differing(board, part, examples)) for part in PARTS} if examples else {}
    light, dark = (base64.b64encode(figure.svg(board, look)).decode() for look in (figure.LIGHT, figure.DARK))
    return template.render(
        board=board,
        verdicts=verdicts,
        failed=any(one.fails for one in verdicts),
        told=list(_told(board)),
        figures={"light": light, "dark": dark},
        meanings={name: meaning_of(name) for name in board.scores},
        lower=LOWER,
        scores=texts.score_rows(board),
        heads=texts.DIFFERENCE_HEADS,
        differences=texts.difference_rows(board),
        explained=texts.explained(board),
        examples={PARTS[part].title: own for part, own in found.items() if own},
    )


def differing(board: Board, part: str, most: int) -> Iterator[Example]:
    """Prompts on which the judged model and another part.

    Args:
        board: The results.
        part: What was asked, out of `PARTS`.
        most: How many, at most.

    Yields:
        Prompts with the answers of all models that were asked; those that count against the judged model first.
    """
    asked = PARTS[part]
    there = [one for one in board.results if asked.score in one.evaluation.values]
    if board.subject not in there:
        return
    responses = {one.name: one.responses(part) for one in there}
    own = board.subject.evaluation.values[asked.score]
    apart = [
        index
        for index, value in enumerate(own)
        if any(one.evaluation.values[asked.score][index] != value for one in there)
        and all(index in responses[one.name] for one in there)
    ]
    apart.sort(key=lambda index: (not _is_bad(asked.score, own[index]), index))
    for index in apart[:most]:
        prompt = responses[board.subject.name][index][0]
        answers = (_answer(one, asked, index, responses[one.name][index][1]) for one in there)
        yield Example(number=index + 1, prompt=_cut(prompt), answers=tuple(answers))


def _answer(one: NamedResult, asked: Asked, index: int, text: str) -> Answer:
    values = one.evaluation.values
    value = values[asked.score][index]
    labels = [label for score, label in asked.labels if score in values and values[score][index] == 1]
    # Of a task the score itself is shown, which may be a part of one.
    usual = "answered" if asked.labels else f"score {value:g}" if value is not None else "no score"
    label = labels[0] if labels else usual
    return Answer(name=one.name, text=_cut(text), label=label, is_bad=_is_bad(asked.score, value))


def _is_bad(score: str, value: float | None) -> bool:
    return value is not None and (value > 0) == (meaning_of(score).better == LOWER)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [... {len(text) - LONGEST} more characters]"


def _told(board: Board) -> Iterator[tuple[str, bool, str]]:
    for one in board.results:
        parts = []
        for asked in PARTS.values():
            score = one.scores.get(asked.score)
            if score is not None and score.unit == "share":
                parts.append(asked.told.format(count=f"{score.value * score.count:g}", all=score.count))
        if parts:
            yield one.name, one is board.subject, f"{', '.join(parts[:-1])}{' and ' * (len(parts) > 1)}{parts[-1]}."
