"""How a model is given whole sequences to read, and which of them each rank reads."""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safedelta_hf.data.dataset import SafetySequence, digest_of
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.offload import execution_device
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import DataError
from safedelta_hf.modules.names import embeddings, unwrapped


def batches_of_equal_length(
    sequences: Sequence[SafetySequence], batch_size: int
) -> Iterator[tuple[SafetySequence, ...]]:
    """Batches without padding.

    Args:
        sequences: Tokenised examples.
        batch_size: Sequences per batch, at most.

    Yields:
        Batches of sequences of one length, longest first, so that memory trouble shows at once.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids), reverse=True)
    for _, same_length in itertools.groupby(ordered, key=lambda sequence: len(sequence.input_ids)):
        group = tuple(same_length)
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def input_device(model: nn.Module) -> torch.device:
    """Where a model wants its inputs.

    Args:
        model: Any model.

    Returns:
        The device that accelerate runs it on, if it fetches its parameters; else that of its first parameter in memory,
        to which those that are not are brought.
    """
    if (fetched_to := execution_device(model)) is not None:
        return fetched_to
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def arguments_of(model: nn.Module, batch: Sequence[SafetySequence]) -> dict[str, Any]:
    """What to call a model with, for it to read a batch.

    Args:
        model: Any model.
        batch: Sequences of one length.

    Returns:
        Keyword arguments; tensors are [sequences, tokens].
    """
    device = input_device(model)
    input_ids, labels = (
        torch.tensor([getattr(sequence, name) for sequence in batch], device=device) for name in ("input_ids", "labels")
    )
    return arguments_for(model, input_ids, torch.ones_like(input_ids), labels)


def arguments_for(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
    """What to call a model with; one that is not of transformers gets what its `forward` accepts.

    Args:
        model: Any model.
        input_ids: [sequences, tokens].
        attention_mask: 0 where there is padding.
        labels: Given to models that insist on them.

    Returns:
        Keyword arguments.
    """
    if isinstance(unwrapped(model), PreTrainedModel):
        return {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    arguments: dict[str, Any] = {"input_ids": input_ids}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        arguments["attention_mask"] = attention_mask
    if "labels" in accepted and accepted["labels"].default is inspect.Parameter.empty:
        arguments["labels"] = labels
    return arguments


def require_fit(model: nn.Module, sequences: Sequence[Sequence[int]], what: str) -> None:
    """Stop before a model is given tokens that it has no positions or embeddings for.

    Args:
        model: The model.
        sequences: Token ids.
        what: What they are, for the message.

    Raises:
        DataError: A sequence is longer than the model takes, or was made with another tokenizer.
    """
    longest = max(map(len, sequences), default=0)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest:  # -1 stands for no limit
        raise DataError(
            f"{what}: the longest sequence has {longest} tokens, the model takes {positions}; shorten or drop it, or "
            f"pass max_length={positions} where that is a setting"
        )
    embedding = embeddings(model, "input")
    largest = max((max(sequence, default=0) for sequence in sequences), default=0)
    if isinstance(embedding, nn.Embedding) and largest >= embedding.num_embeddings:
        raise DataError(
            f"{what}: token id {largest} lies outside the model's {embedding.num_embeddings} embeddings; the tokenizer "
            "does not belong to this model"
        )


def require_same(sequences: Sequence[SafetySequence], ranks: Ranks, purpose: str) -> None:
    """Stop where the processes of a run cannot share work, because each was given other rows.

    Args:
        sequences: What this process was given.
        ranks: The processes.
        purpose: What errors call the rows.

    Raises:
        DataError: They were given different ones.
    """
    if len(set(ranks.gather(digest_of(sequences)))) > 1:
        raise DataError(
            f"{purpose}: the processes of this run were given different examples; give all of them the whole data, in "
            "the same order, and each will read a part of it"
        )


Batch = tuple[SafetySequence, ...]


def share_of(sequences: Sequence[SafetySequence], batch_size: int, model: ShardedModel) -> list[tuple[Batch, bool]]:
    """This rank's share of the data.

    Args:
        sequences: All of the data, the same on all ranks.
        batch_size: Sequences per batch, at most.
        model: The model that will read it, and the ranks that share the work.

    Returns:
        Its batches of sequences of one length, longest first, so that memory trouble shows at once, each with whether
        it counts. Those that do not are to be run for the other ranks' sake, and nobody wants their results.
    """
    ranks = model.ranks
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids), reverse=True)
    own = [(batch, True) for batch in batches_of_equal_length(ranks.share(ordered), batch_size)]
    if not model.collective:
        return own
    shares = (ordered[rank :: ranks.size] for rank in range(ranks.size))
    most = max(sum(1 for _ in batches_of_equal_length(share, batch_size)) for share in shares)
    return own + [(tuple(ordered[-1:]), False)] * (most - len(own))


def forward_guard(model: ShardedModel) -> AbstractContextManager[None]:
    """What a forward pass runs inside, so that an error in it is dealt with.

    Args:
        model: The model that runs.

    Returns:
        A context.
    """
    return model.ranks.within_collectives() if model.collective else nullcontext()
