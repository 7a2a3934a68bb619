"""Adapters that are no product `B A`: their delta is read off a merged copy of each layer, and written as a LoRA."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.lora_deltas import AdapterPart, Replaces
from safedelta_hf.deltas.lora_folder import TENSOR_FILE
from safedelta_hf.deltas.lora_layers import whole_parts
from safedelta_hf.errors import AdapterError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.modules.names import ADAPTER_PREFIX, parameter_names
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.records import Storage


@dataclass(frozen=True, kw_only=True)
class MergedPart:
    """What any tuner does to the weight of one layer.

    Attributes:
        parameter: Canonical name of the weight.
        layer: The tuner's layer.
        adapter: Name of the adapter.
        rank: Rank of the LoRA that is written instead.
    """

    parameter: str
    layer: Any
    adapter: str
    rank: int
    storage: ClassVar[Storage] = Storage.DENSE

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.layer.get_base_layer().weight.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name.

        Returns:
            Whatever the tuner has.
        """
        own = self.layer.named_parameters()
        return {f"{self.parameter} ({key})": tensor for key, tensor in own if self.adapter in key.split(".")}

    def delta(self) -> DenseDelta:
        """The delta of the weight: a copy of the layer, merged in float32, minus the base.

        Returns:
            A dense delta.

        Raises:
            AdapterError: The tuner has no delta on the weight, or also changes the bias.
        """
        # The copy alone is merged; whatever else the adapter shares with it is left out of the comparison.
        merged = copy.deepcopy(self.layer).float()
        base = self.layer.get_base_layer()
        try:
            merged.merge(safe_merge=True, adapter_names=[self.adapter])
        except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            raise AdapterError(f"{self.parameter}: its adapter cannot be merged into a weight ({error})") from error
        bias, tuned_bias = getattr(base, "bias", None), getattr(merged.get_base_layer(), "bias", None)
        if bias is not None and tuned_bias is not None and not torch.equal(bias.float(), tuned_bias):
            raise AdapterError(
                f"{self.parameter}: the adapter changes the bias of its layer too, which a LoRA on the weight cannot "
                "hold; merge it and use adjust_model"
            )
        return DenseDelta(merged.get_base_layer().weight, base.weight.float())

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Write the best product of a given rank.

        Args:
            delta: From `delta`, adjusted.
            writer: Collects the factors.

        Returns:
            What the rank leaves out.
        """
        assert isinstance(delta, DenseDelta), "a merged layer has a dense delta"
        module = self.parameter.removesuffix(".weight")
        is_embedding = isinstance(self.layer.get_base_layer(), nn.Embedding)
        is_transposed = is_embedding or isinstance(self.layer.get_base_layer(), Conv1D)
        matrix = delta.values.T if is_transposed else delta.values
        up, down = best_factors(matrix, self.rank)
        ends = (".lora_embedding_A", ".lora_embedding_B") if is_embedding else (".lora_A.weight", ".lora_B.weight")
        for end, factor in zip(ends, (down, up), strict=True):
            writer.replace(module + end, factor, factor)
        norm = float(matrix.norm())
        left_out = float((matrix - up @ down).norm()) / norm if norm else 0.0
        return (f"rank {down.shape[0]} leaves out {left_out:.2%} of the norm of the adjusted delta",)


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


def merged_parts(model: nn.Module, adapter_name: str, rank: int) -> list[AdapterPart]:
    """List what an adapter of any kind does to the weights of its base.

    Args:
        model: The model that has the adapter, unmerged, held whole by this process.
        adapter_name: Its name.
        rank: Rank of the LoRA that is written.

    Returns:
        One part for each tuned weight.

    Raises:
        AdapterError: It has no delta on a weight.
    """
    names = parameter_names(model)
    parts = [part for module in model.modules() for part in _parts(module, adapter_name, rank, names)]
    if not parts:
        raise AdapterError(
            f"adapter {adapter_name!r}: changes no weight (as prompt and prefix tuning do not), so there is no delta "
            "to adjust"
        )
    return parts


def _parts(module: nn.Module, adapter: str, rank: int, names: dict[nn.Parameter, str]) -> Iterator[AdapterPart]:
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        if adapter in module.modules_to_save:
            yield from whole_parts(module.modules_to_save[adapter], module.original_module, names)
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
        yield MergedPart(parameter=names[weight], layer=module, adapter=adapter, rank=rank)


def _holds(layer: Any, adapter: str) -> bool:  # noqa: ANN401
    return any(adapter in getattr(layer, attribute, ()) for attribute in layer.adapter_layer_names)


class LoraFolder:
    """Collects the tensors of a LoRA, and writes its folder once the block has succeeded.

    Args:
        output: Folder to write.
        parts: What is written.
        settings: Further fields of its configuration.

    Raises:
        AdapterError: The output exists.
    """

    def __init__(self, output: Path, parts: Sequence[AdapterPart], settings: Mapping[str, Any]) -> None:
        if output.exists():
            raise AdapterError(f"output: {str(output)!r} exists already; remove it or choose another folder")
        self._output = output
        self._layers = {part.parameter.removesuffix(".weight"): part for part in parts if isinstance(part, MergedPart)}
        self._settings = settings
        self._tensors: dict[str, Tensor] = {}

    def __enter__(self) -> "LoraFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            with complete_or_absent(self._output) as unfinished:
                self._config().save_pretrained(str(unfinished))
                save_file(self._tensors, unfinished / TENSOR_FILE, metadata={"format": "pt"})

    def replace(self, name: str, parameter: Tensor, value: Tensor) -> None:
        """Collect a tensor.

        Args:
            name: Its name in the base model.
            parameter: Of the dtype in which it is written.
            value: Its value.
        """
        self._tensors[ADAPTER_PREFIX + name] = value.detach().to("cpu", parameter.dtype).contiguous()

    def _config(self) -> Any:  # noqa: ANN401 - PEFT is imported lazily
        from peft import LoraConfig

        ranks = {
            name: min(part.rank, *part.shape)
            for name, part in self._layers.items()
            if any(key.startswith(f"{ADAPTER_PREFIX}{name}.lora_") for key in self._tensors)
        }
        top = max(ranks.values(), default=1)
        smaller = {name: rank for name, rank in ranks.items() if rank != top}
        return LoraConfig(
            r=top,
            lora_alpha=top,
            rank_pattern=smaller,
            alpha_pattern=dict(smaller),
            target_modules=list(ranks),
            modules_to_save=self._settings.get("modules_to_save"),
            fan_in_fan_out=any(isinstance(part.layer.get_base_layer(), Conv1D) for part in self._layers.values()),
            inference_mode=True,
            base_model_name_or_path=self._settings.get("base_model_name_or_path"),
            revision=self._settings.get("revision"),
            task_type=self._settings.get("task_type"),
        )
