"""Run a model for measurement, as it is, and leave no trace of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from safedelta_hf.errors import DataError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, then restore training flags and the random state.

    Adapters stay as they are: what is measured is the model as it would be used.

    Args:
        model: The model that will be called.

    Yields:
        Nothing.
    """
    training = {module: module.training for module in model.modules()}
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


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
    if isinstance(positions, int) and longest > positions:
        raise DataError(f"{what}: the longest has {longest} tokens, the model takes {positions}; shorten or drop it")
    getter = getattr(model, "get_input_embeddings", None)
    rows = getattr(getter() if callable(getter) else None, "num_embeddings", None)
    largest = max((max(sequence, default=0) for sequence in sequences), default=0)
    if isinstance(rows, int) and largest >= rows:
        raise DataError(
            f"{what}: token id {largest} lies outside the model's {rows} embeddings; the tokenizer does not belong to "
            "this model"
        )
