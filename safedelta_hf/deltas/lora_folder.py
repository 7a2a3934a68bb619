"""An adapter in the folder that PEFT saves it in: whether and how it has a delta on the weights of its base."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safedelta_hf.deltas.lora_deltas import (
    BiasDelta,
    FullDelta,
    LoraDelta,
    LowRankDelta,
    TokenRowsDelta,
    low_rank_shape,
)
from safedelta_hf.deltas.lora_layers import NO_BIAS
from safedelta_hf.deltas.lora_settings import (
    CONFIG_FILE,
    initialised_from_base,
    is_targeted,
    of_module,
    peft_type,
    read_settings,
    require_low_rank,
)
from safedelta_hf.errors import AdapterError, CheckpointError, ProfileError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.modules.names import ADAPTER_PREFIX, is_hub_name
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.report import Report
from safedelta_hf.report.provenance import RECORD_FILE, write_provenance
from safedelta_hf.weights.digest import digest
from safedelta_hf.weights.safetensors_files import FLOATING, read_header

TENSOR_FILE = "adapter_model.safetensors"

_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

_FACTOR = re.compile(r"\.lora_(embedding_)?([AB])(\.weight)?$")


_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


class AdapterFolder:
    """A saved LoRA adapter: its configuration, and private copies of its tensors.

    Args:
        folder: A folder that PEFT wrote.

    Raises:
        AdapterError: It is no such folder, a file cannot be read, or it has no delta `s B A`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self.config = _read_config(self.folder)
        self.shapes = _read_shapes(self.folder)
        self.is_converted = False

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Private copies of its tensors, by name; nothing of them is read before the first is asked for."""
        return _read_tensors(self.folder)

    def scaling(self, module: str, rank: int) -> float:
        """What the product `B A` of a module is multiplied with.

        Args:
            module: Name of the module in the base model.
            rank: Rank of its factors.

        Returns:
            `alpha / r`, or `alpha / sqrt(r)` for a rank-stabilised LoRA.

        Raises:
            AdapterError: The configuration gives another rank.
        """
        expected = of_module(module, self.config.rank_pattern, self.config.r)
        if rank != expected:
            raise AdapterError(f"{module}: the factors have rank {rank}, {CONFIG_FILE} says {expected}")
        alpha = of_module(module, self.config.alpha_pattern, self.config.lora_alpha)
        return float(alpha) / (math.sqrt(rank) if self.config.use_rslora else rank)

    def doubt(self, header: ProfileHeader) -> str:
        """Compare what the adapter says of its base with what a profile was made of, as far as names tell.

        Args:
            header: What the profile was made from.

        Returns:
            Why they do not tell that the two are one model; empty where name and revision are the same.

        Raises:
            ProfileError: They are two.
        """
        name, revision = self.config.base_model_name_or_path, self.config.revision
        architecture = self._base_class()
        if architecture not in (None, header.architecture) or (
            is_hub_name(name) and header.name is not None and name.lower() != header.name.lower()
        ):
            raise ProfileError(
                f"profile: made of {header.model}, and the adapter {str(self.folder)!r} is on {name or 'a base'}"
                f"{f' ({architecture})' if architecture else ''}; collect a profile of that base. If one is a copy of "
                "the other, pass base=<its folder> (--base on the command line), and weights are compared instead"
            )
        if header.name is None or not is_hub_name(name):
            said = f"names {name!r} as its base" if name else "names no base"
            return f"the adapter {said}, which cannot be compared with what the profile names ({header.model})"
        if _is_commit(revision) and _is_commit(header.revision) and revision != header.revision:
            return f"the adapter is on revision {revision} of {name}, the profile was made of {header.revision}"
        return ""

    def _base_class(self) -> str | None:
        # PEFT enters it where the adapter has no task type; FSDP2 gives a sharded model a class of its own.
        mapping = self.settings.get("auto_mapping")
        name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
        return name.removeprefix("FSDP") if isinstance(name, str) else None

    def subtract(self, initial: "AdapterFolder") -> None:
        """Make the adapter one for the original base, when its initialisation took a part of that base with it.

        `W0 + D = (W0 - s B0 A0) + s B A`, so `D = s [B, -B0] [A; A0]`, of twice the rank.

        Args:
            initial: The adapter as it was before training.

        Raises:
            AdapterError: It is another adapter, or its scaling cannot be written for twice the rank.
        """
        if not initialised_from_base(initial.config) and not initialised_from_base(self.config):
            raise AdapterError(
                f"initial_adapter: {str(self.folder)!r} was not initialised from the base weights "
                f"(init_lora_weights={self.config.init_lora_weights!r}), so nothing has to be subtracted; leave it out"
            )
        if initial.shapes != self.shapes:
            raise AdapterError(
                f"initial_adapter: {str(initial.folder)!r} holds other tensors than {str(self.folder)!r}; pass the "
                "adapter that save_pretrained wrote right after get_peft_model, before training"
            )
        for key, tensor in self.tensors.items():
            if (factor := _FACTOR.search(key)) is not None:
                start = initial.tensors[key].to(tensor.dtype)
                is_down = factor.group(2) == "A"
                self.tensors[key] = torch.cat([tensor, start] if is_down else [tensor, -start], dim=0 if is_down else 1)
                self.shapes[key] = tuple(self.tensors[key].shape)
        growth = math.sqrt(2) if self.config.use_rslora else 2
        doubled = {
            "r": self.config.r * 2,
            "lora_alpha": self.config.lora_alpha * growth,
            "rank_pattern": {key: rank * 2 for key, rank in self.config.rank_pattern.items()},
            "alpha_pattern": {key: alpha * growth for key, alpha in self.config.alpha_pattern.items()},
            "init_lora_weights": True,
        }
        for key, value in doubled.items():
            setattr(self.config, key, value)
        self.settings |= doubled
        self.is_converted = True

    def write(self, output: Path, replaced: Mapping[str, Tensor], report: Report | None) -> None:
        """Write the adapter; complete or not there at all.

        Everything else that stands beside it is copied, but for subfolders, which hold other adapters or checkpoints.

        Args:
            output: A folder that does not exist.
            replaced: New values of some of its tensors, by name; cast to their data types.
            report: What was done to them; None if they were not adjusted.
        """
        with complete_or_absent(output) as unfinished:
            for path in self.folder.iterdir():
                if path.is_file() and path.name not in (TENSOR_FILE, RECORD_FILE):
                    shutil.copyfile(path, unfinished / path.name)
            if self.is_converted:
                text = json.dumps(self.settings, indent=2, sort_keys=True)
                (unfinished / CONFIG_FILE).write_text(text, encoding="utf-8")
            tensors = {
                key: replaced.get(key, tensor).to(tensor.dtype).contiguous() for key, tensor in self.tensors.items()
            }
            with safe_open(self.folder / TENSOR_FILE, framework="pt") as file:
                metadata = file.metadata()
            save_file(tensors, unfinished / TENSOR_FILE, metadata=metadata)
            if report is not None:
                write_provenance(unfinished, report)


class LoraTensors:
    """Sorts the tensors of a saved adapter by the parameter that they tune, told from their names; no base is loaded.

    Args:
        adapter: The adapter.
        header: What the profile of its base was made from.
        transposed: Names of the weights that are stored with their inputs first.
        read_base: Reads a base weight by canonical name, for the deltas that are relative to one.
        shapes: Shapes of parameters of the base, as far as they are known: compared before any tensor is read.
    """

    def __init__(
        self,
        adapter: AdapterFolder,
        header: ProfileHeader,
        transposed: set[str],
        read_base: Callable[[str], Tensor],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._adapter = adapter
        self._header = header
        self._transposed = transposed
        self._read_base = read_base
        self._expected = shapes or {}
        self._names = {key.removeprefix(ADAPTER_PREFIX): key for key in adapter.shapes}
        self._tensors = {key: torch.empty(adapter.shapes[name], device="meta") for key, name in self._names.items()}

    def __iter__(self) -> Iterator[LoraDelta]:
        self._require_whole()
        for key in self._tensors:
            self._require_shape(key)
        self._tensors = {key: self._adapter.tensors[name] for key, name in self._names.items()}
        left = set(self._tensors)
        for key in self._tensors:
            if key in left:
                delta, used = self._delta(key)
                left -= used
                if delta is not None:
                    yield delta

    def _require_whole(self) -> None:
        # PEFT fails where tensors are missing that the configuration promises.
        config = self._adapter.config
        names = tuple(config.modules_to_save or ())
        for parameter in self._header.base if names else ():
            modules = itertools.accumulate(parameter.split(".")[:-1], "{}.{}".format)
            if parameter not in self._tensors and any(module.endswith(names) for module in modules):
                raise AdapterError(
                    f"{parameter}: modules_to_save={list(names)} of {CONFIG_FILE} has the adapter carry it whole, and "
                    f"{TENSOR_FILE} does not hold it; is the file complete?"
                )
        promised = config.trainable_token_indices not in (None, {})
        if promised and not any(key.endswith(_TOKEN_ROWS) for key in self._tensors):
            raise AdapterError(
                f"adapter: {CONFIG_FILE} names trainable_token_indices, and {TENSOR_FILE} holds no {_TOKEN_ROWS}; is "
                "the file complete?"
            )

    def _require_shape(self, key: str) -> None:
        for ends in (_LINEAR, _EMBEDDING):
            if key.endswith(ends):
                module = key.removesuffix(ends[0]).removesuffix(ends[1])
                for own in (module + end for end in ends):
                    if self._factor(own).dim() < 2:
                        raise AdapterError(f"{own}: has the shape {list(self._factor(own).shape)}, and is no matrix")
                if not is_targeted(module, self._adapter.config.target_modules):
                    raise AdapterError(
                        f"{module}: none of the target_modules of {CONFIG_FILE}, so PEFT passes its factors over; save "
                        "the adapter again"
                    )
                pair = self._low_rank(module, ends)
                self._require_same(pair.parameter, pair.shape)
                return
        dimensions = 1 if key.endswith(".lora_B.bias") else 2 if key.endswith(_TOKEN_ROWS) else None
        if dimensions not in (None, self._tensors[key].dim()):
            raise AdapterError(
                f"{key}: has the shape {list(self._tensors[key].shape)}, expected {dimensions} dimensions"
            )
        if dimensions is None:
            self._require_same(key.replace(".base_layer.", "."), tuple(self._tensors[key].shape))

    def _require_same(self, parameter: str, shape: tuple[int, ...]) -> None:
        expected = self._expected.get(parameter, shape)
        if shape != expected:
            raise ProfileError(
                f"{parameter}: has the shape {list(shape)} by the adapter's tensors, and {list(expected)} in the model "
                "that the profile was made for; collect a profile of this adapter's base"
            )

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
        if base.shape[1:] != rows.shape[1:] or max(indices, default=0) >= len(base):
            raise AdapterError(
                f"{module}: rows {list(rows.shape)} for the tokens {indices[:5]}..., and the embedding of the base is "
                f"{list(base.shape)}; was the vocabulary resized?"
            )
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
                f"{self._header.architecture} that the profile was made for; a profile knows a tied weight by one name "
                "alone (that of the embedding), and an adapter on the other can be adjusted in memory: adjust_adapter"
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


def _read_config(folder: Path) -> Any:  # noqa: ANN401 - a configuration of PEFT
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # a configuration of any tuner, and of any version of PEFT
        raise AdapterError(f"adapter: {str(folder / CONFIG_FILE)!r} cannot be read by PEFT ({error!r})") from error
    config.rank_pattern = getattr(config, "rank_pattern", None) or {}
    config.alpha_pattern = getattr(config, "alpha_pattern", None) or {}
    require_low_rank(config)
    if config.target_parameters:
        raise AdapterError(
            f"adapter: {peft_type(config)} with target_parameters is not covered from files; load it and use "
            "adjust_adapter"
        )
    return config


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise AdapterError(
            f"adapter: {str(folder)!r} holds no {TENSOR_FILE}; save the adapter with safe_serialization=True"
        )
    try:
        stored = read_header(TENSOR_FILE, path)
    except CheckpointError as error:
        raise AdapterError(f"adapter: {error}") from error
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATING:
            raise AdapterError(
                f"{name}: stored as {tensor.dtype} in {str(path)!r}; only {', '.join(FLOATING)} are read as numbers"
            )
    return {name: tensor.shape for name, tensor in stored.items()}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSOR_FILE
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"adapter: cannot read {str(path)!r} ({error}); is the file complete?") from error


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def _token_indices(setting: Any, module: str) -> list[int]:  # noqa: ANN401 - a list, or a dictionary by module
    if isinstance(setting, Mapping):
        for name, indices in setting.items():
            if module == name or module.endswith(f".{name}"):
                return list(indices)
        raise AdapterError(f"{module}: trainable_token_indices of the configuration names {sorted(setting)} only")
    return list(setting or [])
