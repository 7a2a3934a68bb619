"""Run a model for inspection and leave no trace of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from safedelta_hf.modules.precision import in_own_precision


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients in the model's own precision, then restore flags, random state and compilation.

    Everything that is read with a model, be it the base or the tuned one, is read in here: what training wraps around
    it, such as autocast, would round one of the two otherwise than the other (see `in_own_precision`). Eval
    mode silences dropout and NEFTune noise, which are gated on the training flag. Compiled models run eagerly, because
    a compiled graph does not call hooks that were added later.

    Args:
        model: The model that will be called.

    Yields:
        Nothing.
    """
    training = {module: module.training for module in model.modules()}
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            in_own_precision(model),
        ):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let a model compute what its base does, then put its adapters back.

    Args:
        model: A model with or without adapters on it.

    Yields:
        Nothing.
    """
    adapted = [module for module in model.modules() if getattr(module, "disable_adapters", None) is False]
    try:
        _enable(adapted, False)
        yield
    finally:
        _enable(adapted, True)


def _enable(layers: Sequence[nn.Module], enabled: bool) -> None:
    for layer in layers:
        trained = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        layer.enable_adapters(enabled)  # type: ignore[operator]
        # PEFT sets it along with the adapters. A sharded parameter may have a gathered one in its place later, which
        # takes it over.
        for parameter, flag in trained.items():
            parameter.requires_grad = flag
