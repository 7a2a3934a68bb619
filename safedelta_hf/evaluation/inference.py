"""Run a model for measurement, as it is, and leave no trace of it."""

from collections.abc import Iterator
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


def require_fit(model: nn.Module, longest: int, what: str) -> None:
    """Stop before a model is given more tokens than it has positions for.

    Args:
        model: The model.
        longest: Number of tokens of the longest sequence.
        what: The sequences, for the message.

    Raises:
        DataError: The model takes fewer tokens.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise DataError(f"{what}: the longest has {longest} tokens, the model takes {positions}; shorten or drop it")
