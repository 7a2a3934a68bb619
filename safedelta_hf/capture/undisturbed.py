"""Run a model for inspection and leave no trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients, then restore training flags, random state and compilation.

    Eval mode silences dropout and NEFTune noise, which are gated on the training flag. Compiled models run eagerly,
    because a compiled graph does not call hooks that were added later.

    Args:
        model: The model that will be called.

    Yields:
        Nothing.
    """
    training = {module: module.training for module in model.modules()}
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag
