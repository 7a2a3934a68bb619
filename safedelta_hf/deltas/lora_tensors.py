"""What an adapter in files does to each parameter, told from the names of its tensors; the base is not loaded."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from safedelta_hf.deltas.lora_deltas import (
    BiasDelta,
    FullDelta,
    LoraDelta,
    LowRankDelta,
    TokenRowsDelta,
    low_rank_shape,
)
from safedelta_hf.deltas.lora_folder import AdapterFolder
from safedelta_hf.deltas.lora_layers import NO_BIAS
from safedelta_hf.errors import AdapterError
from safedelta_hf.modules.names import ADAPTER_PREFIX
from safedelta_hf.records import ProfileHeader
from safedelta_hf.weights.digest import digest

_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"


class LoraTensors:
    """Sorts the tensors of a saved adapter by the parameter that they tune.

    Args:
        adapter: The adapter.
        header: What the profile of its base was made from.
        transposed: Names of the weights that are stored with their inputs first.
        read_base: Reads a base weight by canonical name, for the deltas that are relative to one.
    """

    def __init__(
        self,
        adapter: AdapterFolder,
        header: ProfileHeader,
        transposed: set[str],
        read_base: Callable[[str], Tensor],
    ) -> None:
        self._adapter = adapter
        self._header = header
        self._transposed = transposed
        self._read_base = read_base
        self._names = {key.removeprefix(ADAPTER_PREFIX): key for key in adapter.tensors}
        self._tensors = {key: adapter.tensors[name] for key, name in self._names.items()}

    def __iter__(self) -> Iterator[LoraDelta]:
        left = set(self._tensors)
        for key in self._tensors:
            if key in left:
                delta, used = self._delta(key)
                left -= used
                if delta is not None:
                    yield delta

    def _delta(self, key: str) -> tuple[LoraDelta | None, set[str]]:
        for ends in (_LINEAR, _EMBEDDING):
            for end in ends:
                if key.endswith(end):
                    module = key.removesuffix(end)
                    return self._low_rank(module, ends), {f"{module}{one}" for one in ends}
        if key.endswith(".lora_B.bias"):
            return self._bias(key.removesuffix(".lora_B.bias"), key), {key}
        if key.endswith(_TOKEN_ROWS):
            return self._token_rows(key.removesuffix(_TOKEN_ROWS), key), {key}
        return self._full(key.replace(".base_layer.", "."), key), {key}

    def _low_rank(self, module: str, ends: tuple[str, str]) -> LowRankDelta:
        keys = [module + end for end in ends]
        down, up = map(self._factor, keys)
        if up.flatten(1).shape[1] != len(down):
            raise AdapterError(
                f"{module}: A is {list(down.shape)} and B is {list(up.shape)}, which have no product; LoRA on grouped "
                "convolutions is not covered"
            )
        parameter = f"{module}.weight"
        transposed = ends is _EMBEDDING or parameter in self._transposed
        return LowRankDelta(
            parameter=parameter,
            shape=low_rank_shape(down, up, transposed=transposed),
            tensors={self._names[key]: self._tensors[key] for key in keys},
            scaling=self._adapter.scaling(module, len(down)) if len(down) else 0.0,
            transposed=transposed,
        )

    def _factor(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise AdapterError(f"{key}: not in the adapter, although the other factor is; is the file complete?")
        return self._tensors[key]

    def _bias(self, module: str, key: str) -> BiasDelta:
        if f"{module}.bias" not in self._header.base:
            raise AdapterError(f"{module}: {NO_BIAS}")
        rank = len(self._factor(f"{module}.lora_A.weight"))
        return BiasDelta(
            parameter=f"{module}.bias",
            shape=tuple(self._tensors[key].shape),
            tensors={self._names[key]: self._tensors[key]},
            scaling=self._adapter.scaling(module, rank),
        )

    def _token_rows(self, module: str, key: str) -> TokenRowsDelta:
        rows = self._tensors[key]
        indices = _token_indices(self._adapter.config.trainable_token_indices, module)
        if len(indices) != len(rows):
            raise AdapterError(f"{module}: {len(rows)} rows for {len(indices)} trainable token indices")
        parameter = f"{module}.weight"
        base = self._read_base(parameter)
        return TokenRowsDelta(
            parameter=parameter,
            shape=tuple(base.shape),
            tensors={self._names[key]: rows},
            indices=torch.tensor(indices),
            base=base,
        )

    def _full(self, parameter: str, key: str) -> FullDelta | None:
        tensor = self._tensors[key]
        expected = self._header.base.get(parameter)
        if expected is None:
            raise AdapterError(
                f"{parameter}: a tensor of the adapter that is neither a factor nor a parameter of the "
                f"{self._header.architecture} that the profile was made for"
            )
        # PEFT saves embeddings along with an adapter on them; such a copy of the base is no delta.
        if digest(tensor.to(getattr(torch, self._header.dtypes[parameter]))) == expected:
            return None
        base = self._read_base(parameter)
        if base.shape != tensor.shape:
            raise AdapterError(
                f"{parameter}: {list(tensor.shape)} in the adapter, {list(base.shape)} in the base; was the vocabulary "
                "resized? The profile is of the smaller one"
            )
        return FullDelta(parameter=parameter, shape=tuple(base.shape), tensors={self._names[key]: tensor}, base=base)


def _token_indices(setting: Any, module: str) -> list[int]:  # noqa: ANN401 - a list, or a dictionary by module
    if isinstance(setting, Mapping):
        for name, indices in setting.items():
            if module == name or module.endswith(f".{name}"):
                return list(indices)
        raise AdapterError(f"{module}: trainable_token_indices of the configuration names {sorted(setting)} only")
    return list(setting or [])
