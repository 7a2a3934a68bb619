"""What an adapter on a model in memory does to each parameter."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from safedelta_hf.deltas.lora_deltas import (
    BiasDelta,
    ExpertsDelta,
    FullDelta,
    LoraDelta,
    LowRankDelta,
    TokenRowsDelta,
    low_rank_shape,
)
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import AdapterError
from safedelta_hf.modules.names import canonical, unwrapped

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


def lora_deltas(model: ShardedModel, adapter_name: str) -> list[LoraDelta]:
    """List what a LoRA adapter does to each parameter.

    Args:
        model: The model that has the adapter; all its ranks call this. The adapter's tensors are brought together.
        adapter_name: Its name.

    Returns:
        One delta for each tuned parameter, in module order.
    """
    names = {model.live(name): name for name in model.all_names}
    deltas: list[LoraDelta] = []
    seen: set[str] = set()
    for module in model.model.modules():
        for delta in _deltas(module, adapter_name, model, names):
            # Tied layers may hold one and the same tensor.
            if not seen.issuperset(delta.tensors):
                deltas.append(delta)
            seen.update(delta.tensors)
    return deltas


def _deltas(
    module: nn.Module, adapter: str, model: ShardedModel, names: Mapping[nn.Parameter, str]
) -> Iterator[LoraDelta]:
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if adapter in module.modules_to_save:
            yield from full_deltas(module.modules_to_save[adapter], module.original_module, model, names)
    elif isinstance(module, TrainableTokensLayer):
        if adapter in module.trainable_tokens_delta:
            yield _token_rows(module, adapter, model, names)
    elif isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A):
        if isinstance(module, MultiheadAttention):
            raise AdapterError("adapter: LoRA on MultiheadAttention is not covered; merge it and use adjust_model")
        if isinstance(module, ParamWrapper):
            yield _named_parameter(module, adapter, model, names)
        else:
            yield from _low_rank(module, adapter, model, names)


def full_deltas(
    tuned: nn.Module, original: nn.Module, model: ShardedModel, names: Mapping[nn.Parameter, str]
) -> Iterator[FullDelta]:
    """The parameters of a module that an adapter carries whole (`modules_to_save`).

    Args:
        tuned: The adapter's copy of the module.
        original: The module of the base.
        model: The model that has both.
        names: Names of its parameters.

    Yields:
        One delta for each parameter.
    """
    base = {canonical(key): parameter for key, parameter in original.named_parameters()}
    for key, parameter in tuned.named_parameters():
        name, own = names[base[canonical(key)]], names[parameter]
        yield FullDelta(
            parameter=name,
            shape=tuple(model.shape(name)),
            tensors={own: model.gather(own)},
            base=model.gather(name),
        )


def _token_rows(
    layer: Any,  # noqa: ANN401
    adapter: str,
    model: ShardedModel,
    names: Mapping[nn.Parameter, str],
) -> TokenRowsDelta:
    weight = layer.get_base_layer().weight
    if weight not in names:  # PEFT before 0.20 lays tokens of a tied weight over the tokens of the other
        weight = cast(Any, unwrapped(layer.get_base_layer())).weight
    name, rows = names[weight], names[layer.trainable_tokens_delta[adapter]]
    if name not in model.names:
        raise AdapterError(
            f"{name}: the adapter trains some of its tokens (trainable_token_indices) on top of a copy of all of them "
            "(modules_to_save); choose one of the two"
        )
    base = model.gather(name)
    return TokenRowsDelta(
        parameter=name,
        shape=tuple(base.shape),
        tensors={rows: model.gather(rows)},
        indices=torch.tensor(layer.token_indices[adapter], device=base.device),
        base=base,
    )


def _named_parameter(
    layer: Any,  # noqa: ANN401
    adapter: str,
    model: ShardedModel,
    names: Mapping[nn.Parameter, str],
) -> LowRankDelta | ExpertsDelta:
    name = names[layer.get_param()]
    shape = tuple(model.shape(name))
    pair = [names[factors[adapter].weight] for factors in (layer.lora_A, layer.lora_B)]
    make = LowRankDelta if len(shape) == 2 else ExpertsDelta
    return make(
        parameter=name,
        shape=shape,
        tensors={own: model.gather(own) for own in pair},
        scaling=float(layer.scaling[adapter]),
        # PEFT takes the first dimension of a matrix for its inputs, unless it swapped them.
        transposed=len(shape) == 3 and not layer._did_swap_in_out_features,
    )


def _low_rank(
    layer: Any,  # noqa: ANN401
    adapter: str,
    model: ShardedModel,
    names: Mapping[nn.Parameter, str],
) -> Iterator[LoraDelta]:
    base: Any = unwrapped(layer.get_base_layer())  # of a tied weight, tokens of it may be trained beside
    if getattr(base, "weight", None) not in names:
        raise AdapterError(
            f"adapter: {type(base).__name__} below it keeps no parameter called weight, so its moment has no name; "
            "quantised classes with one (bitsandbytes, torchao) are covered"
        )
    name = names[base.weight]
    is_embedding = adapter in layer.lora_embedding_A
    if is_embedding:
        factors = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        _require_same_reach(name, base)
        factors = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    tensors = {names[factor]: model.gather(names[factor]) for factor in factors}
    scaling = float(layer.scaling[adapter])
    transposed = is_embedding or bool(getattr(layer, "fan_in_fan_out", False))
    yield LowRankDelta(
        parameter=name,
        shape=low_rank_shape(*tensors.values(), transposed=transposed),
        tensors=tensors,
        scaling=scaling,
        transposed=transposed,
    )
    if layer.lora_bias.get(adapter) and scaling:
        bias = getattr(base, "bias", None)
        if bias is None:
            raise AdapterError(f"{name}: {NO_BIAS}")
        own = names[layer.lora_B[adapter].bias]
        offset = model.gather(own)
        yield BiasDelta(parameter=names[bias], shape=tuple(offset.shape), tensors={own: offset}, scaling=scaling)


def _require_same_reach(name: str, base: nn.Module) -> None:
    # PEFT convolves with `A` over all channels and without dilation, whatever the layer below does.
    groups, dilation = getattr(base, "groups", 1), getattr(base, "dilation", 1)
    spread = set(dilation) if isinstance(dilation, tuple) else {dilation}
    if groups != 1 or spread != {1}:
        raise AdapterError(
            f"{name}: LoRA on a convolution with groups={groups}, dilation={dilation} reads other inputs than the "
            "convolution does, so it is no delta of its weight"
        )
