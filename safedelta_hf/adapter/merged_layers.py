"""Adapters that are no product `B A`: their delta is read off a merged copy of each layer, and written as a LoRA."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.lora_deltas import Adjusted, LoraDelta
from safedelta_hf.deltas.lora_folder import TENSOR_FILE
from safedelta_hf.deltas.lora_layers import full_deltas
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import AdapterError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.modules.names import ADAPTER_PREFIX
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.report import Report
from safedelta_hf.report.provenance import write_provenance


@dataclass(frozen=True, kw_only=True)
class MergedDelta(LoraDelta):
    """What any tuner does to the weight of one layer; its tensors are whatever the tuner has.

    Attributes:
        layer: The tuner's layer.
        adapter: Name of the adapter.
        rank: Rank of the LoRA that is written instead.
    """

    layer: Any
    adapter: str
    rank: int

    @property
    @override
    def is_dense(self) -> bool:
        return True

    @override
    def delta(self) -> DenseDelta:
        # The copy alone is merged; whatever else the adapter shares with it is left out of the comparison.
        merged = copy.deepcopy(self.layer).float()
        base = self.layer.get_base_layer()
        try:
            merged.merge(safe_merge=True, adapter_names=[self.adapter])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # as PEFT says that it cannot; NotImplementedError is one of them
            raise AdapterError(f"{self.parameter}: its adapter cannot be merged into a weight ({error})") from error
        bias, tuned_bias = getattr(base, "bias", None), getattr(merged.get_base_layer(), "bias", None)
        if bias is not None and tuned_bias is not None and not torch.equal(bias.float(), tuned_bias):
            raise AdapterError(
                f"{self.parameter}: the adapter changes the bias of its layer too, which a LoRA on the weight cannot "
                "hold; merge it and use adjust_model"
            )
        return DenseDelta(merged.get_base_layer().weight, base.weight.float())

    @override
    def adjusted(self, delta: Delta) -> Adjusted:
        assert isinstance(delta, DenseDelta), "a merged layer has a dense delta"
        base = self.layer.get_base_layer()
        is_embedding = isinstance(base, nn.Embedding)
        values = delta.values
        matrix = values.T if is_embedding or isinstance(base, Conv1D) else values
        up, down = best_factors(matrix, self.rank)
        module = ADAPTER_PREFIX + self.parameter.removesuffix(".weight")
        ends = (".lora_embedding_A", ".lora_embedding_B") if is_embedding else (".lora_A.weight", ".lora_B.weight")
        norm = float(matrix.norm())
        left_out = float((matrix - up @ down).norm()) / norm if norm else 0.0
        product = (up @ down).T if matrix is not values else up @ down
        return Adjusted(
            {module + end: factor for end, factor in zip(ends, (down, up), strict=True)},
            delta.keeping(product.contiguous()),
            (f"rank {down.shape[0]} leaves out {left_out:.2%} of the norm of the adjusted delta",),
        )


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of a given rank that is nearest to a matrix.

    Args:
        matrix: [out, in] float32.
        rank: At most this many singular values are kept.

    Returns:
        `B` [out, rank] and `A` [rank, in], each with the square root of the singular values.
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def merged_deltas(model: ShardedModel, adapter_name: str, rank: int) -> list[LoraDelta]:
    """List what an adapter of any kind does to the weights of its base.

    Args:
        model: The model that has the adapter, unmerged, held whole by this process.
        adapter_name: Its name.
        rank: Rank of the LoRA that is written.

    Returns:
        One delta for each tuned weight.

    Raises:
        AdapterError: It has no delta on a weight.
    """
    names = {model.live(name): name for name in model.all_names}
    modules = model.model.modules()
    deltas = [delta for module in modules for delta in _deltas(module, adapter_name, rank, model, names)]
    if not deltas:
        raise AdapterError(
            f"adapter {adapter_name!r}: changes no weight (as prompt and prefix tuning do not), so there is no delta "
            "to adjust"
        )
    return deltas


def _deltas(
    module: nn.Module, adapter: str, rank: int, model: ShardedModel, names: Mapping[nn.Parameter, str]
) -> Iterator[LoraDelta]:
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if adapter in module.modules_to_save:
            for delta in full_deltas(module.modules_to_save[adapter], module.original_module, model, names):
                (tuned,) = delta.tensors.values()
                yield replace(delta, tensors={ADAPTER_PREFIX + delta.parameter: tuned})
    elif isinstance(module, BaseTunerLayer) and _holds(module, adapter):
        weight = getattr(module.get_base_layer(), "weight", None)
        if isinstance(module, TrainableTokensLayer) or weight is None or weight.ndim != 2:
            raise AdapterError(
                f"adapter {adapter!r}: what it does to {type(module.get_base_layer()).__name__} cannot be written as a "
                "LoRA on a matrix; merge it and use adjust_model"
            )
        if is_quantised(weight):
            raise AdapterError(
                f"{names[weight]}: is quantised, so merging would round it again; dequantize the base first"
            )
        yield _merged(module, adapter, rank, names[weight])


def _merged(layer: Any, adapter: str, rank: int, parameter: str) -> MergedDelta:  # noqa: ANN401
    return MergedDelta(
        parameter=parameter,
        shape=tuple(layer.get_base_layer().weight.shape),
        tensors={f"{parameter} ({key})": own for key, own in layer.named_parameters() if adapter in key.split(".")},
        layer=layer,
        adapter=adapter,
        rank=rank,
    )


def _holds(layer: Any, adapter: str) -> bool:  # noqa: ANN401
    return any(adapter in getattr(layer, attribute, ()) for attribute in layer.adapter_layer_names)


def write_lora(
    output: Path,
    deltas: Sequence[LoraDelta],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    report: Report,
) -> None:
    """Write the folder of a LoRA; complete or not there at all.

    Args:
        output: Folder to write.
        deltas: What it was made of.
        settings: Further fields of its configuration.
        tensors: Its tensors.
        report: What was done to them.
    """
    with complete_or_absent(output) as unfinished:
        _config(deltas, settings, tensors).save_pretrained(str(unfinished))
        save_file(dict(tensors), unfinished / TENSOR_FILE, metadata={"format": "pt"})
        write_provenance(unfinished, report)


def _config(deltas: Sequence[LoraDelta], settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    from peft import LoraConfig

    layers = {delta.parameter.removesuffix(".weight"): delta for delta in deltas if isinstance(delta, MergedDelta)}
    ranks = {
        name: min(delta.rank, *delta.shape)
        for name, delta in layers.items()
        if any(key.startswith(f"{ADAPTER_PREFIX}{name}.lora_") for key in tensors)
    }
    top = max(ranks.values(), default=1)
    smaller = {name: rank for name, rank in ranks.items() if rank != top}
    return LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=list(ranks),
        modules_to_save=settings.get("modules_to_save"),
        fan_in_fan_out=any(isinstance(delta.layer.get_base_layer(), Conv1D) for delta in layers.values()),
        inference_mode=True,
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        revision=settings.get("revision"),
        task_type=settings.get("task_type"),
    )
