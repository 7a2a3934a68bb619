"""Which rows of a fine-tuning data set its base would refuse, and how surely: for who runs a fine-tuning service."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from safedelta_hf.data.batches import require_fit
from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data, tokenised
from safedelta_hf.data.openings import DEPTH, REFUSED, Asked, Tokens, asked, refusal_probabilities
from safedelta_hf.data.rows import read_rows
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.generation import model_digest
from safedelta_hf.evaluation.sorting import MANY, prompt_text, verdict
from safedelta_hf.folders import RunLog, locked, require_absent, unfinished_of, write_whole
from safedelta_hf.records.sorting import Outcome
from safedelta_hf.report.progress import progress_bar

_BATCHES: Final = 16
"""Forward passes after which what was found is written."""

_COMPARED: Final = 256
"""Refused rows that are compared with the safety data, at most."""

_SHOWN: Final = 5


@dataclass(frozen=True, kw_only=True)
class AuditedRow:
    """What the base says to one row.

    Attributes:
        row: Its number, from 0.
        place: Where it stands, such as "train.jsonl line 3".
        refused: Whether the base would refuse its prompt; None where that cannot be judged.
        probability: How likely the base is to begin its answer as refusals begin.
        answered: Whether the row's own response begins otherwise than refusals do.
        prompt: The end of its prompt as text; empty without a tokenizer.
        reason: Why it cannot be judged.
    """

    row: int
    place: str
    refused: bool | None = None
    probability: float | None = None
    answered: bool | None = None
    prompt: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What the base says to a data set.

    Attributes:
        rows: What it says to each row, in their order.
        outcome: What the refused rows tell, as in `TaskSorting`: they are few ("sorted"), or the data looks harmful, or
            the base seems to refuse too much, or nothing tells.
        compared: Number of refused rows that were compared with the safety data, where they are many.
        near: Number of those that are as near to it as its prompts are to one another.
    """

    rows: tuple[AuditedRow, ...]
    outcome: Outcome = Outcome.SORTED
    compared: int = 0
    near: int = 0

    @property
    def judged(self) -> list[AuditedRow]:
        """The rows that could be judged."""
        return [one for one in self.rows if one.refused is not None]

    @property
    def refused(self) -> list[AuditedRow]:
        """The rows that the base would refuse, the surest first."""
        return sorted((one for one in self.rows if one.refused), key=lambda one: (-(one.probability or 0.0), one.row))

    @property
    def contested(self) -> list[AuditedRow]:
        """The rows that the base would refuse and the data answers, the surest first."""
        return [one for one in self.refused if one.answered]

    @property
    def share(self) -> float:
        """Share of the judged rows that the base would refuse and the data answers; 0 where none was judged."""
        return len(self.contested) / len(self.judged) if self.judged else 0.0

    def summary(self) -> str:
        """The audit in a few lines.

        Returns:
            Plain text.
        """
        judged, refused, contested = len(self.judged), len(self.refused), len(self.contested)
        lines = [
            f"{len(self.rows)} rows, {judged} judged: the base would refuse {refused}, of which the data answers "
            f"{contested} ({self.share:.1%} of those judged)"
        ]
        if self.outcome is not Outcome.SORTED:
            near = (
                f"of {self.compared} of these, {self.near} are as near to the safety data as its prompts are to one "
                "another"
            )
            lines.append(
                {
                    Outcome.HARMFUL: f"Many are refused; {near}: the data looks harmful",
                    Outcome.OVER_REFUSAL: f"Many are refused; {near}: the base seems to refuse too much",
                    Outcome.UNKNOWN: "Many are refused, and nothing tells whether the data is harmful or the base "
                    "refuses too much",
                }[self.outcome]
            )
        lines += [f"  {one.place} ({one.probability:.3f}): {one.prompt}" for one in self.contested[:_SHOWN]]
        reasons: dict[str, list[str]] = {}
        for one in self.rows:
            if one.refused is None:
                reasons.setdefault(one.reason.removeprefix(one.place).lstrip(": "), []).append(one.place)
        lines += [f"Not judged: {len(places)} rows, such as {places[0]}: {why}" for why, places in reasons.items()]
        return "\n".join(lines)


def audit_data(
    model: nn.Module,
    task_dataset: Source,
    safety_dataset: Source,
    processing_class: ProcessingClass | None = None,
    *,
    output: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Audit:
    """Find the rows of a fine-tuning data set whose prompts the base itself would refuse.

    Nothing is generated: the base reads each prompt, and how likely it is to go on as the responses of the safety data
    begin is read off its next tokens (`refusal_probabilities`).

    Args:
        model: The base (aligned) model, on any device; adapters on it are disabled meanwhile.
        task_dataset: The fine-tuning data: rows of any form that `read_safety_data` takes, or where they are.
        safety_dataset: Harmful prompts with the responses of a safe model, best the base's own.
        processing_class: Tokenizer or processor; not needed for tokenised rows.
        output: File of JSON lines to write, one for each row, in their order. It appears once it is complete; a run
            that was killed goes on where it stopped. None writes nothing.
        batch_size: Prompts of one length per forward pass, at most.
        progress: Whether to show a progress bar.

    Returns:
        What the base says to each row. Rows that cannot be judged are among them, with the reason.

    Raises:
        ConfigurationError: `batch_size` is below 1, or the safety data has no prompts.
        DataError: The data or the safety data cannot be read, no row can be judged, or the safety data does not fit the
            model.
        OutputError: The output exists, is being written, was begun with something else, or cannot be written.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size: must be at least 1, got {batch_size}")
    refusals = read_safety_data(safety_dataset, processing_class)
    try:
        rows = read_rows(task_dataset)
    except DataError as error:
        raise error.at("task data") from error
    read = [_read(row, place, processing_class) for place, row in rows]
    questions = asked([one for one in read if isinstance(one, SafetySequence)], refusals, processing_class)
    if not questions.openings:
        raise ConfigurationError(
            "safety data: its prompts cannot be told from its responses, so nothing tells how a refusal begins; give "
            "it as 'messages', as 'prompt' and 'completion', or with labels"
        )
    places, opened = [place for place, _ in rows], ShardedModel(model)
    prompts, reasons, answered = _judged(opened, read, places, questions)
    if not prompts:
        why = reasons[0].removeprefix(places[0]).lstrip(": ")
        raise DataError(f"task data: none of its {len(rows)} rows can be judged, such as {places[0]}: {why}")
    with _log_of(output, opened, prompts, questions, processing_class) as log:
        found = {} if log is None else {row: value for entry in log.entries for row, value in entry.items()}
        for more in _probabilities(opened, prompts, questions, found, batch_size, progress=progress):
            found |= more
            if log is not None:
                log.append({"found": {str(row): value for row, value in more.items()}})
        result = _compared(
            opened, _rows(places, prompts, found, answered, reasons, processing_class), prompts, questions
        )
        if output is not None and log is not None:
            write_whole(Path(output), "".join(f"{json.dumps(asdict(one))}\n" for one in result.rows))
            log.path.unlink()
    return result


def _read(row: Any, place: str, processing_class: ProcessingClass | None) -> SafetySequence | str:  # noqa: ANN401
    # The sequence, or why there is none.
    try:
        return tokenised(row, place, processing_class) or "its response is marked as undesirable"
    except DataError as error:
        return str(error)


def _judged(
    model: ShardedModel, read: Sequence[SafetySequence | str], places: Sequence[str], questions: Asked
) -> tuple[dict[int, Tokens], dict[int, str], dict[int, bool]]:
    # Prompts of the rows that can be judged, reasons of the others, and whether a row's response is no refusal.
    prompts: dict[int, Tokens] = {}
    reasons = {row: one for row, one in enumerate(read) if isinstance(one, str)}
    rows = [row for row in range(len(read)) if row not in reasons]
    answered = {row: not refuses for row, refuses in zip(rows, questions.refusing, strict=True)}
    for row, prompt in zip(rows, questions.prompts, strict=True):
        if prompt is None:
            reasons[row] = "its prompt cannot be told from its response, or one of them is missing"
            continue
        try:
            # A refusal is followed a little way.
            require_fit(model.runnable, [prompt + prompt[:1] * (DEPTH - 1)], places[row])
        except DataError as error:
            reasons[row] = str(error)
        else:
            prompts[row] = prompt
    return prompts, reasons, answered


@contextmanager
def _log_of(
    output: str | Path | None,
    model: ShardedModel,
    prompts: Mapping[int, Tokens],
    questions: Asked,
    processing_class: ProcessingClass | None,
) -> Iterator[RunLog[dict[int, float]] | None]:
    place = None if output is None else Path(output)
    with nullcontext() if place is None else locked(place):
        if place is None:
            yield None
            return
        require_absent(place)
        given = {"data": sorted(prompts.items()), "safety data": sorted(questions.openings)}
        digests = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in given.items()}
        yield RunLog(unfinished_of(place), {"model": model_digest(model.model, processing_class), **digests}, _found_of)


def _found_of(line: Mapping[str, Any]) -> dict[int, float]:
    return {int(row): float(value) for row, value in line["found"].items()}


def _probabilities(
    model: ShardedModel,
    prompts: Mapping[int, Tokens],
    questions: Asked,
    known: Mapping[int, float],
    batch_size: int,
    *,
    progress: bool,
) -> Iterator[dict[int, float]]:
    # Longest first, so that memory trouble shows at once. Whole parts are known, so those that are left are the same
    # parts, and batches, as without an interruption.
    left = sorted((row for row in prompts if row not in known), key=lambda row: (-len(prompts[row]), row))
    size = _BATCHES * batch_size
    with progress_bar(
        total=len(prompts), initial=len(prompts) - len(left), desc="Auditing", unit="row", disable=not progress
    ) as bar:
        for start in range(0, len(left), size):
            part = left[start : start + size]
            found = refusal_probabilities(
                model, [prompts[row] for row in part], questions.openings, batch_size=batch_size
            )
            yield dict(zip(part, found, strict=True))
            bar.update(len(part))


def _rows(
    places: Sequence[str],
    prompts: Mapping[int, Tokens],
    found: Mapping[int, float],
    answered: Mapping[int, bool],
    reasons: Mapping[int, str],
    processing_class: ProcessingClass | None,
) -> list[AuditedRow]:
    return [
        AuditedRow(row=row, place=place, reason=reasons[row])
        if row in reasons
        else AuditedRow(
            row=row,
            place=place,
            refused=found[row] > REFUSED,
            probability=found[row],
            answered=answered[row],
            prompt=prompt_text(prompts[row], processing_class),
        )
        for row, place in enumerate(places)
    ]


def _compared(
    model: ShardedModel, rows: Sequence[AuditedRow], prompts: Mapping[int, Tokens], questions: Asked
) -> Audit:
    refused = [one.row for one in rows if one.refused]
    if len(refused) <= MANY * len(prompts):
        return Audit(rows=tuple(rows))
    some = sorted(random.Random(0).sample(refused, min(_COMPARED, len(refused))))
    outcome, near = verdict(model, {row: prompts[row] for row in some}, questions.refusals)
    return Audit(rows=tuple(rows), outcome=outcome, compared=len(some), near=len(near or ()))
