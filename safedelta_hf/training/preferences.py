"""Pairs of a safe and a harmful reply to one prompt: how they are read, drawn, and told apart by a model."""

import random
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safedelta_hf.data.batches import input_device
from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.rows import read_rows
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.errors import CaptureError, DataError
from safedelta_hf.modules.names import unwrapped

COLUMNS: Final = ("prompt", "chosen", "rejected")
OPTIONS: Final = ("tools", "chat_template_kwargs")
"""What a chat template is given beside the turns."""


class PreferencePair(NamedTuple):
    """Two tokenised replies to one prompt.

    Attributes:
        chosen: Prompt and safe reply.
        rejected: The same prompt and a harmful reply.
    """

    chosen: SafetySequence
    rejected: SafetySequence


def read_pairs(
    source: Source, processing_class: ProcessingClass | None, max_length: int | None = None
) -> tuple[PreferencePair, ...]:
    """Tokenise rows in TRL's preference format with an explicit prompt, conversational or not.

    Args:
        source: Rows, or where they are, as safety data; each holds `prompt`, `chosen` and `rejected`: strings, or lists
            of turns.
        processing_class: Tokenizer, or processor with a `tokenizer`.
        max_length: Sequences are cut to this many tokens, at the end; None leaves them whole.

    Returns:
        The pairs, in the order of the source.

    Raises:
        DataError: There are no rows, a row lacks a column, or no token of a reply has one before it.
    """
    placed = read_rows(source)
    for place, row in placed:
        missing = [column for column in COLUMNS if not isinstance(row, Mapping) or row.get(column) is None]
        if missing:
            raise DataError(f"pairs: {place} lacks {', '.join(missing)}; each row needs {', '.join(COLUMNS)}")

    def sequences(column: str) -> list[SafetySequence]:
        completed = [
            {"prompt": row["prompt"], "completion": row[column]} | {key: row[key] for key in OPTIONS if key in row}
            for _, row in placed
        ]
        found = read_safety_data(completed, processing_class, max_length, purpose=f"pairs, {column}")
        for (place, _), sequence in zip(placed, found, strict=True):
            if not _reply_tokens(sequence):
                raise DataError(f"pairs, {column}: {place}: no token of the reply has one before it")
        return found

    return tuple(map(PreferencePair, sequences("chosen"), sequences("rejected")))


def draw(pairs: Sequence[PreferencePair], number: int, size: int, seed: int) -> list[PreferencePair]:
    """One of an endless row of batches, in which each pair comes once before any comes again.

    A batch depends on its number alone, so a run that goes on from a checkpoint needs no state for it.

    Args:
        pairs: All of them.
        number: Number of the batch, from 0.
        size: Pairs in a batch.
        seed: Of the orders.

    Returns:
        The batch.
    """
    count = len(pairs)
    places = range(number * size, (number + 1) * size)
    orders = {
        turn: random.Random(f"pairs {seed} {turn}").sample(range(count), count)
        for turn in range(places[0] // count, places[-1] // count + 1)
    }
    return [pairs[orders[place // count][place % count]] for place in places]


def contrastive_loss(chosen: Tensor, rejected: Tensor, batch: Sequence[PreferencePair]) -> Tensor:
    """`-log sigmoid(log p(chosen) - log p(rejected))`, which the code of SAP's authors trains (arXiv 2505.16737).

    Args:
        chosen: Log-likelihoods of some of the safe replies, summed over their tokens and divided by a temperature,
            [pairs].
        rejected: Those of the harmful replies to the same prompts, [pairs].
        batch: The pairs over which the mean is taken; each process has some of them.

    Returns:
        The part of the mean that the given pairs make.
    """
    return -nn.functional.logsigmoid(chosen - rejected).sum() / len(batch)


def difference_loss(chosen: Tensor, rejected: Tensor, batch: Sequence[PreferencePair]) -> Tensor:
    """`L(W; D_safe) - L(W; D_harm)` (SAP, arXiv 2505.16737, Algorithm 1), each a mean over reply tokens.

    Args:
        chosen: Log-likelihoods of some of the safe replies, summed over their tokens and divided by a temperature,
            [pairs].
        rejected: Those of the harmful replies to the same prompts, [pairs].
        batch: The pairs over which the means are taken; each process has some of them.

    Returns:
        The part of the difference that the given pairs make.
    """
    safe, harmful = (sum(map(_reply_tokens, side)) for side in zip(*batch, strict=True))
    return rejected.sum() / harmful - chosen.sum() / safe


LOSSES: Final = {"contrastive": contrastive_loss, "difference": difference_loss}


def log_likelihoods(model: nn.Module, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor]:
    """How likely a model finds both replies of each pair; gradients flow.

    Args:
        model: A causal language model, as it is called in training.
        pairs: At least one.

    Returns:
        Log-likelihoods of the chosen and of the rejected replies, summed over their tokens, [pairs] each; float32, or
        float64 of a model in that.

    Raises:
        CaptureError: The model returns no logits.
    """
    sequences = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    device = input_device(model)
    input_ids, labels, seen = (
        nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=fill).to(device)
        for rows, fill in (
            ([sequence.input_ids for sequence in sequences], 0),
            ([sequence.labels for sequence in sequences], IGNORED),
            ([[1] * len(sequence.input_ids) for sequence in sequences], 0),
        )
    )
    without_cache = {"use_cache": False} if isinstance(unwrapped(model), PreTrainedModel) else {}
    output = model(input_ids=input_ids, attention_mask=seen, **without_cache)
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"{type(model).__name__} returns no logits to tell likelihoods by")
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))  # the first token is not predicted
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:].to(logits.device), ignore_index=IGNORED, reduction="none"
    )
    chosen, rejected = (-losses.sum(1)).chunk(2)
    return chosen, rejected


def _reply_tokens(sequence: SafetySequence) -> int:
    return sum(label != IGNORED for label in sequence.labels[1:])
