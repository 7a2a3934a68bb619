"""Run a model for inspection: leave no trace of it, and read it in the precision of its weights."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from safedelta_hf.modules.names import base_modules, parameter_names
from safedelta_hf.modules.quantised import is_quantised


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
    model.eval()
    try:
        with (
            random_state_kept(model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            in_own_precision(model),
        ):
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Leave the random state of the host and of a model's devices as it is before the block.

    Args:
        model: The model.

    Returns:
        A context.
    """
    devices = sorted({parameter.device.index or 0 for parameter in model.parameters() if parameter.is_cuda})
    return torch.random.fork_rng(devices=devices)


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


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """Let a model compute in the data type of its weights: no autocast, around it or in accelerate's `forward`.

    DeepSpeed's engines, which hold weights in another type, and packed weights compute as ever. Where weights of
    several types meet, be it in the model or because FSDP's mixed precision gathers them in another, the cast may be
    needed for the model to run at all, and it is left as it is called in training.

    Args:
        model: The model that will be called.

    Yields:
        Nothing.
    """
    if len(_types_of_weights(model)) > 1 or any(map(_gathers_in_another_type, model.modules())):
        yield
        return
    casting = {module: vars(module)["forward"] for module in model.modules() if _is_cast_by_accelerate(module)}
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for module, forward in casting.items():
            stack.callback(setattr, module, "forward", forward)
            # The cast is switched on again inside of what accelerate put in its place.
            module.forward = vars(module)["_original_forward"]
        yield


def _types_of_weights(model: nn.Module) -> set[torch.dtype]:
    return {
        parameter.dtype
        for parameter in parameter_names(model)
        if parameter.is_floating_point() and not is_quantised(parameter)
    }


def _gathers_in_another_type(module: nn.Module) -> bool:
    if isinstance(module, FSDPModule):
        return module._get_fsdp_state()._mp_policy.param_dtype is not None
    return isinstance(module, FullyShardedDataParallel) and module.mixed_precision.param_dtype is not None


def _is_cast_by_accelerate(module: nn.Module) -> bool:
    own = vars(module)  # a PeftModel looks up what it lacks in the model that it wraps
    return "_original_forward" in own and hasattr(own.get("forward"), "__wrapped__")


@contextmanager
def precision_seen(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """See in which data types the layers of a model compute, whoever chose them.

    Args:
        model: The model that will be called.

    Yields:
        What was seen; it grows while the model runs.
    """
    seen: set[torch.dtype] = set()

    def look(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.add(output.dtype)
        chosen = getattr(module, "compute_dtype", None)  # packed weights give back the type that they were given
        if isinstance(chosen, torch.dtype):
            seen.add(chosen)

    with ExitStack() as hooks:
        for _, module in base_modules(model):
            if module._parameters:
                hooks.callback(module.register_forward_hook(look).remove)
        yield seen


def coarsest(types: set[torch.dtype]) -> torch.dtype:
    """The floating-point type with the largest rounding step.

    Args:
        types: Floating-point types, at least one.

    Returns:
        One of them.
    """
    return max(types, key=lambda dtype: torch.finfo(dtype).eps)


@contextmanager
def rounding_otherwise(model: nn.Module, dtype: torch.dtype) -> Iterator[bool]:
    """Let a model round otherwise at every step: each embedding is moved by one rounding step, up or down.

    That is as much as the data type cannot tell anyway, so what changes in the model's output is noise of reading.

    Args:
        model: The model that will be called.
        dtype: The type that it computes in.

    Yields:
        Whether the model has embeddings.
    """
    half = torch.finfo(dtype).eps / 2

    def move(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ANN401
        signs = torch.randint(2, output.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        return output + output * (half * signs.to(output))  # rounds to a neighbour of each entry

    embeddings = [module for _, module in base_modules(model) if isinstance(module, nn.Embedding)]
    with ExitStack() as hooks:
        for module in embeddings:
            hooks.callback(module.register_forward_hook(move).remove)
        yield bool(embeddings)
