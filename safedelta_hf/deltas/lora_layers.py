"""The parts of an adapter on a model in memory."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.deltas.gathered import Whole, WholeTensors, as_it_is
from safedelta_hf.deltas.lora_deltas import (
    AdapterPart,
    DensePart,
    ExpertsPart,
    LowRankPart,
    OffsetPart,
    TokenRowsPart,
)
from safedelta_hf.distributed.open_model import HeldModel
from safedelta_hf.errors import AdapterError
from safedelta_hf.modules.names import canonical, parameter_names

NO_BIAS = (
    "the adapter (lora_bias=True) adds a bias to a layer that has none, so it has neither a moment nor, in PEFT, a "
    "merged form; train without lora_bias"
)


def adapter_config(model: nn.Module, adapter_name: str) -> Any:  # noqa: ANN401 - PEFT is imported lazily
    """The configuration of an adapter that can be adjusted as it stands.

    Args:
        model: The model that has the adapter.
        adapter_name: Its name.

    Returns:
        A configuration of PEFT.

    Raises:
        AdapterError: There is none of this name, or an adapter is merged.
    """
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(f"adapter {adapter_name!r}: not on this {type(model).__name__}; it has {sorted(configs)}")
    require_unmerged(model)
    return configs[adapter_name]


def active_adapters(model: nn.Module) -> list[str]:
    """Name the adapters that a model computes with.

    Args:
        model: A model of PEFT, or one whose adapters transformers or `peft.inject_adapter_in_model` added.

    Returns:
        Names in the order of activation; empty if it has none.
    """
    names: Any = getattr(model, "active_adapters", ())
    if not callable(names):
        return list(names)
    # What transformers offers is a method, which knows only adapters that transformers added, and asks for the newest
    # PEFT; the layers know their own.
    return list(dict.fromkeys(name for layer in tuner_layers(model) for name in layer.active_adapters))


def tuner_layers(model: nn.Module) -> list[Any]:
    """List the layers that adapters are on.

    Args:
        model: Any model.

    Returns:
        PEFT's layers, in module order.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def require_unmerged(model: nn.Module) -> None:
    """Make sure that no adapter is merged into the base weights.

    Args:
        model: Any model.

    Raises:
        AdapterError: One is.
    """
    merged = {name for module in model.modules() for name in getattr(module, "merged_adapters", ())}
    if merged:
        raise AdapterError(
            f"adapter: {sorted(merged)} merged into the base weights, so those are not the base; "
            "unmerge_adapter() first"
        )


def adapter_parts(model: nn.Module, adapter_name: str, tensors: WholeTensors | None = None) -> list[AdapterPart]:
    """List what a LoRA adapter does to each parameter.

    Args:
        model: The model that has the adapter.
        adapter_name: Its name.
        tensors: Brings tensors together that are sharded; not needed where this process holds them whole.

    Returns:
        One part for each tuned parameter, in module order.
    """
    names = parameter_names(model)
    tensors = tensors or WholeTensors(HeldModel.of(model))
    parts: list[AdapterPart] = []
    seen: set[int] = set()
    for module in model.modules():
        for part in _parts(module, adapter_name, names, tensors):
            # Tied layers may hold one and the same tensor.
            places = {tensor.data_ptr() for tensor in part.tensors().values() if tensor.numel()}
            if not places or not places <= seen:
                parts.append(part)
            seen |= places
    return parts


def _parts(
    module: nn.Module, adapter: str, names: dict[nn.Parameter, str], tensors: WholeTensors
) -> Iterator[AdapterPart]:
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if adapter in module.modules_to_save:
            yield from whole_parts(module.modules_to_save[adapter], module.original_module, names, tensors.of)
    elif isinstance(module, TrainableTokensLayer):
        if adapter in module.trainable_tokens_delta:
            yield _token_rows(module, adapter, names, tensors.of)
    elif isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
        if isinstance(module, MultiheadAttention):
            raise AdapterError("adapter: LoRA on MultiheadAttention is not covered; merge it and use adjust_model")
        if isinstance(module, ParamWrapper):
            yield _named_parameter(module, adapter, names, tensors)
        else:
            yield from _low_rank(module, adapter, names, tensors.of)


def whole_parts(
    tuned: nn.Module, original: nn.Module, names: dict[nn.Parameter, str], whole: Whole = as_it_is
) -> Iterator[DensePart]:
    """The parameters of a module that an adapter carries whole (`modules_to_save`).

    Args:
        tuned: The adapter's copy of the module.
        original: The module of the base.
        names: Canonical names of the base parameters.
        whole: Gives all of a parameter.

    Yields:
        One part for each parameter.
    """
    base = {canonical(key): parameter for key, parameter in original.named_parameters()}
    for key, parameter in tuned.named_parameters():
        weight = base[canonical(key)]
        yield DensePart(parameter=names[weight], tuned=whole(parameter), base=whole(weight))


def _token_rows(layer: Any, adapter: str, names: dict[nn.Parameter, str], whole: Whole) -> TokenRowsPart:  # noqa: ANN401
    weight = layer.get_base_layer().weight
    base = whole(weight)
    return TokenRowsPart(
        parameter=names[weight],
        rows=whole(layer.trainable_tokens_delta[adapter]),
        indices=torch.tensor(layer.token_indices[adapter], device=base.device),
        base=base,
    )


def _named_parameter(
    layer: Any,  # noqa: ANN401
    adapter: str,
    names: dict[nn.Parameter, str],
    tensors: WholeTensors,
) -> LowRankPart | ExpertsPart:
    weight = layer.get_param()
    shape = tensors.shape(weight)
    make = LowRankPart if len(shape) == 2 else ExpertsPart
    return make(
        parameter=names[weight],
        shape=shape,
        down=tensors.of(layer.lora_A[adapter].weight),
        up=tensors.of(layer.lora_B[adapter].weight),
        scaling=float(layer.scaling[adapter]),
        # PEFT takes the first dimension of a matrix for its inputs, unless it swapped them.
        transposed=len(shape) == 3 and not layer._did_swap_in_out_features,
    )


def _low_rank(
    layer: Any,  # noqa: ANN401
    adapter: str,
    names: dict[nn.Parameter, str],
    whole: Whole,
) -> Iterator[AdapterPart]:
    base = layer.get_base_layer()
    if getattr(base, "weight", None) not in names:
        raise AdapterError(
            f"adapter: {type(base).__name__} below it keeps no parameter called weight, so its moment has no name; "
            "quantised classes with one (bitsandbytes, torchao) are covered"
        )
    name = names[base.weight]
    is_embedding = adapter in layer.lora_embedding_A
    if is_embedding:
        down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        _require_same_reach(name, base)
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    down, up = whole(down), whole(up)
    scaling = float(layer.scaling[adapter])
    transposed = is_embedding or bool(getattr(layer, "fan_in_fan_out", False))
    yield LowRankPart(
        parameter=name,
        shape=low_rank_shape(down, up, transposed=transposed),
        down=down,
        up=up,
        scaling=scaling,
        transposed=transposed,
    )
    if layer.lora_bias.get(adapter) and scaling:
        bias = getattr(base, "bias", None)
        if bias is None:
            raise AdapterError(f"{name}: {NO_BIAS}")
        yield OffsetPart(parameter=names[bias], offset=whole(layer.lora_B[adapter].bias), scaling=scaling)


def low_rank_shape(down: Tensor, up: Tensor, *, transposed: bool) -> tuple[int, ...]:
    """Shape of the weight that a LoRA pair tunes.

    Args:
        down: `A`, [rank, in, ...].
        up: `B`, [out, rank, ...].
        transposed: Whether the weight is stored [in, out].

    Returns:
        The shape of their product.
    """
    return (down.shape[1], up.shape[0]) if transposed else (up.shape[0], *down.shape[1:])


def _require_same_reach(name: str, base: nn.Module) -> None:
    # PEFT convolves with `A` over all channels and without dilation, whatever the layer below does.
    groups, dilation = getattr(base, "groups", 1), getattr(base, "dilation", 1)
    spread = set(dilation) if isinstance(dilation, tuple) else {dilation}
    if groups != 1 or spread != {1}:
        raise AdapterError(
            f"{name}: LoRA on a convolution with groups={groups}, dilation={dilation} reads other inputs than the "
            "convolution does, so it is no delta of its weight"
        )
