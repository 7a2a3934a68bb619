"""What a polish learns from: rows, each with what its teacher predicts of its response."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from safedelta_hf.core.divergence import Targets, divergence, targets_of
from safedelta_hf.data.batches import Batch
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.predictions import read_predictions
from safedelta_hf.data.refusals import split
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.modules.evaluating import without_adapters

Kind = Literal["refusals", "task", "ordinary"]

EXACT: Final = 1024
"""Vocabulary up to which a teacher's predictions are kept whole."""


class Lesson(NamedTuple):
    """A row with its teacher's predictions; plain arrays, so that they can be told to other processes.

    Attributes:
        sequence: The row.
        log_probs: As in `Targets`, of each response token that has one before it.
        tokens: As in `Targets`.
        rest: As in `Targets`.
    """

    sequence: SafetySequence
    log_probs: NDArray[np.float32]
    tokens: NDArray[np.int32] | None
    rest: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What a polish learns from, and what it is measured by, of each kind that there is.

    Attributes:
        taught: Rows for training.
        held_out: Rows that are not trained on.
    """

    taught: Mapping[str, tuple[Lesson, ...]]
    held_out: Mapping[str, tuple[Lesson, ...]]

    def beside(self, other: "Lessons") -> "Lessons":
        """These and others, of other kinds.

        Args:
            other: The others.

        Returns:
            All of them.
        """
        return Lessons(taught={**self.taught, **other.taught}, held_out={**self.held_out, **other.held_out})


def lessons_of(
    teacher: ShardedModel,
    kind: Kind,
    taught: Sequence[SafetySequence],
    held_out: Sequence[SafetySequence],
    *,
    top_k: int,
    batch_size: int = 8,
    progress: bool = False,
) -> Lessons:
    """Let a teacher read rows.

    Args:
        teacher: The model.
        kind: What rows they are.
        taught: Rows for training.
        held_out: Rows to measure by.
        top_k: How many of the likeliest tokens to keep, where the vocabulary is larger than `EXACT`.
        batch_size: Sequences per forward pass, at most.
        progress: Whether to show a progress bar.

    Returns:
        The rows with what it predicts; the same on all ranks.
    """

    def read(logits_nv: Tensor, batch: Batch) -> list[Lesson]:
        targets = targets_of(logits_nv, None if logits_nv.shape[-1] <= EXACT else top_k)
        return [_lesson(sequence, one) for sequence, one in zip(batch, _of_each(targets, batch), strict=True)]

    desc = f"Teaching ({kind})" if progress else None
    read_all = read_predictions(teacher, [*taught, *held_out], read, batch_size=batch_size, desc=desc)
    return Lessons(taught={kind: tuple(read_all[: len(taught)])}, held_out={kind: tuple(read_all[len(taught) :])})


def lessons_of_base(
    base: ShardedModel,
    refusals: tuple[Sequence[SafetySequence], Sequence[SafetySequence]],
    ordinary: Sequence[SafetySequence],
    *,
    holdout: float,
    top_k: int,
    batch_size: int = 8,
    progress: bool = False,
) -> Lessons:
    """Let the base read what it teaches: refusals, and answers to ordinary prompts.

    Args:
        base: The base model; adapters on it are disabled meanwhile.
        refusals: Those to train on, and those held out.
        ordinary: Ordinary rows; may be none.
        holdout: Share of the ordinary rows to hold out.
        top_k: As in `lessons_of`.
        batch_size: As in `lessons_of`.
        progress: As in `lessons_of`.

    Returns:
        The rows with what it predicts.
    """
    teach = partial(lessons_of, base, top_k=top_k, batch_size=batch_size, progress=progress)
    with without_adapters(base.model):
        lessons = teach("refusals", *refusals)
        return lessons.beside(teach("ordinary", *aside(ordinary, holdout))) if ordinary else lessons


def aside(sequences: Sequence[SafetySequence], share: float) -> tuple[list[SafetySequence], list[SafetySequence]]:
    """Hold out a share of some rows; by what their prompts are about, where they are about more than one thing.

    Args:
        sequences: The rows, different ones.
        share: In (0, 1).

    Returns:
        Those to train on, and those held out.
    """
    rows = list(dict.fromkeys(sequences))
    used, held_out = split(rows, share)
    if used and held_out:
        return used, held_out
    every = round(1 / share)
    return [row for number, row in enumerate(rows) if (number + 1) % every], rows[every - 1 :: every]


def divergences(model: ShardedModel, lessons: Sequence[Lesson], batch_size: int = 8) -> list[float]:
    """How far a model is from the teachers of some rows.

    Args:
        model: The model.
        lessons: The rows.
        batch_size: Sequences per forward pass, at most.

    Returns:
        Mean Kullback-Leibler divergence over the response tokens of each row, in nats; the same on all ranks.
    """
    of_rows = {lesson.sequence: lesson for lesson in lessons}

    def read(logits_nv: Tensor, batch: Batch) -> list[float]:
        targets = _together([of_rows[sequence] for sequence in batch], logits_nv.device)
        found = torch.split(divergence(logits_nv, targets).cpu(), [len(of_rows[one].log_probs) for one in batch])
        return [float(one.mean()) for one in found]

    return read_predictions(model, [lesson.sequence for lesson in lessons], read, batch_size=batch_size)


def mean_divergences(model: ShardedModel, lessons: Lessons, batch_size: int = 8) -> dict[str, float]:
    """How far a model is from its teachers on rows that are held out.

    Args:
        model: The model.
        lessons: The rows.
        batch_size: Sequences per forward pass, at most.

    Returns:
        Mean divergence of each kind that has rows held out, in nats per response token.
    """
    return {kind: fmean(divergences(model, rows, batch_size)) for kind, rows in lessons.held_out.items() if rows}


def curriculum(taught: Mapping[str, Sequence[Lesson]], items: int) -> list[list[Lesson]]:
    """As many items as a polish takes, each with one row of each kind; all rows of a kind come equally often.

    Args:
        taught: Rows of each kind.
        items: Number of items.

    Returns:
        The items.
    """
    kinds = [rows for rows in taught.values() if rows]
    return [[rows[number % len(rows)] for rows in kinds] for number in range(items)]


def collated(items: Sequence[Sequence[Lesson]]) -> dict[str, Tensor]:
    """A batch of items, padded on the right.

    Args:
        items: Rows of each item.

    Returns:
        `input_ids`, `attention_mask` and `labels` [rows, tokens], and the targets, with one row each:
        `log_probs` and maybe `target_tokens` [rows, response tokens, k], `rest` [rows, response tokens].
    """
    lessons = [lesson for item in items for lesson in item]
    ids = [torch.tensor(lesson.sequence.input_ids) for lesson in lessons]
    labels = [torch.tensor(lesson.sequence.labels) for lesson in lessons]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "log_probs": _padded([lesson.log_probs for lesson in lessons]),
    }
    if lessons[0].tokens is not None:
        batch["target_tokens"] = _padded([lesson.tokens for lesson in lessons])
        batch["rest"] = _padded([lesson.rest for lesson in lessons])
    return batch


def batch_loss(logits_nv: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the rows of a batch of the mean divergence over the response tokens of each.

    Args:
        logits_nv: The student's logits of the response tokens, one row after the other.
        batch: As `collated` made it.

    Returns:
        A scalar.
    """
    taught = (batch["labels"][:, 1:] != IGNORED).sum(1)
    places = torch.arange(batch["log_probs"].shape[1], device=taught.device) < taught[:, None]
    tokens, rest = batch.get("target_tokens"), batch.get("rest")
    targets = Targets(
        batch["log_probs"][places],
        None if tokens is None else tokens[places].long(),
        None if rest is None else rest[places],
    )
    weights = (1 / (taught * len(taught))).repeat_interleave(taught)
    return (divergence(logits_nv, targets) * weights.to(logits_nv)).sum()


def _lesson(sequence: SafetySequence, targets: Targets) -> Lesson:
    return Lesson(
        sequence,
        targets.log_probs.float().cpu().numpy().copy(),
        None if targets.tokens is None else targets.tokens.int().cpu().numpy().copy(),
        None if targets.rest is None else targets.rest.float().cpu().numpy().copy(),
    )


def _of_each(targets: Targets, batch: Batch) -> list[Targets]:
    counts = [sum(label != IGNORED for label in sequence.labels[1:]) for sequence in batch]
    parts = [[None] * len(batch) if part is None else torch.split(part, counts) for part in targets]
    return [Targets(*of_one) for of_one in zip(*parts, strict=True)]


def _together(lessons: Sequence[Lesson], device: torch.device) -> Targets:
    def joined(arrays: Sequence[NDArray[np.generic] | None]) -> Tensor | None:
        found = [torch.from_numpy(array) for array in arrays if array is not None]
        return torch.cat(found).to(device) if found else None

    log_probs = joined([lesson.log_probs for lesson in lessons])
    tokens = joined([lesson.tokens for lesson in lessons])
    assert log_probs is not None
    return Targets(log_probs, None if tokens is None else tokens.long(), joined([lesson.rest for lesson in lessons]))


def _padded(arrays: Sequence[NDArray[np.generic] | None]) -> Tensor:
    return pad_sequence([torch.from_numpy(array) for array in arrays if array is not None], batch_first=True)
