"""An adapter in the folder that PEFT saves it in: whether and how it has a delta on the weights of its base."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
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
from safedelta_hf.errors import AdapterError, ProfileError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.modules.names import ADAPTER_PREFIX, is_hub_name
from safedelta_hf.records import ProfileHeader
from safedelta_hf.weights.digest import digest

_PLAIN_VARIANTS = ("velora_config",)
"""Variants of LoRA that only change how it is trained."""

_INITIALISED_FROM_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Initialisations that take a part of the base weights out of the base and into the adapter."""

_NO_DELTA_VARIANTS = {
    "alora_invocation_tokens": "aLoRA acts on some tokens only, so it has no delta on a weight",
    "use_qalora": "QA-LoRA pools its inputs and PEFT cannot merge it",
    "arrow_config": "Arrow routes each token to other adapters, so it has no delta on a weight; adjust those adapters",
    "kasa_config": (
        "KaSA truncates the base weights; merge_and_unload() it and use adjust_model(merged, base=<the original base>)"
    ),
}


def require_low_rank(config: Any) -> None:  # noqa: ANN401 - a configuration of PEFT, which is imported lazily
    """Make sure that an adapter adds `s B A` to each weight.

    Args:
        config: Configuration of the adapter.

    Raises:
        AdapterError: It is another tuner, or a variant of LoRA that is not linear in `A`.
    """
    kind = peft_type(config)
    if kind != "LORA":
        raise AdapterError(
            f"adapter: {kind} does not add a product B A that a rule could multiply; where it has a delta on weights, "
            "refactor_adapter(model, output=DIR, rank=N, ...) writes the adjusted delta as a LoRA"
        )
    require_weight_delta(config)
    for variant in variants(config):
        if variant not in _PLAIN_VARIANTS:
            raise AdapterError(
                f"adapter: with {variant} the delta is not linear in A and B, so it has no adjusted form of its own; "
                "refactor_adapter(model, output=DIR, rank=N, ...) writes the adjusted delta as a plain LoRA"
            )


def require_weight_delta(config: Any) -> None:  # noqa: ANN401
    """Make sure that a LoRA has a delta on weights, relative to the base that it was given.

    Args:
        config: Configuration of the adapter.

    Raises:
        AdapterError: It has none, or the base cannot be recovered.
    """
    for variant in variants(config):
        if variant in _NO_DELTA_VARIANTS:
            raise AdapterError(f"adapter: {_NO_DELTA_VARIANTS[variant]}")
    if getattr(config, "init_lora_weights", True) == "loftq":
        raise AdapterError(
            "adapter: LoftQ replaced the base weights by a quantised approximation, from which they cannot be "
            "recovered; merge_and_unload() it and use adjust_model(merged, base=<the original base>)"
        )


def initialised_from_base(config: Any) -> bool:  # noqa: ANN401
    """Whether the adapter took a part of the base weights with it when it was initialised.

    Args:
        config: Configuration of the adapter.

    Returns:
        Whether its delta is relative to what it started from.
    """
    return str(getattr(config, "init_lora_weights", True)).lower().startswith(_INITIALISED_FROM_BASE)


def variants(config: Any) -> list[str]:  # noqa: ANN401
    """The variants of LoRA that a configuration switches on.

    Args:
        config: Configuration of the adapter.

    Returns:
        Names of its fields.
    """
    return [
        field.name for field in fields(config) if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]


def peft_type(config: Any) -> str:  # noqa: ANN401
    """The kind of adapter.

    Args:
        config: Configuration of the adapter.

    Returns:
        A name such as "LORA".
    """
    return str(getattr(config.peft_type, "value", config.peft_type))


CONFIG_FILE = "adapter_config.json"
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
        self.settings = _read_settings(self.folder)
        self.config = _read_config(self.folder)
        self.tensors, self._metadata = _read_tensors(self.folder)
        self.is_converted = False

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
        from peft.utils.other import get_pattern_key

        ranks, alphas = self.config.rank_pattern, self.config.alpha_pattern
        expected = ranks.get(get_pattern_key(ranks.keys(), module), self.config.r)
        if rank != expected:
            raise AdapterError(f"{module}: the factors have rank {rank}, {CONFIG_FILE} says {expected}")
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), self.config.lora_alpha)
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
        if {k: t.shape for k, t in initial.tensors.items()} != {k: t.shape for k, t in self.tensors.items()}:
            raise AdapterError(
                f"initial_adapter: {str(initial.folder)!r} holds other tensors than {str(self.folder)!r}; pass the "
                "adapter that save_pretrained wrote right after get_peft_model, before training"
            )
        for key, tensor in self.tensors.items():
            if (factor := _FACTOR.search(key)) is not None:
                start = initial.tensors[key].to(tensor.dtype)
                is_down = factor.group(2) == "A"
                self.tensors[key] = torch.cat([tensor, start] if is_down else [tensor, -start], dim=0 if is_down else 1)
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

    def write(self, output: Path, replaced: Mapping[str, Tensor]) -> None:
        """Write the adapter; complete or not there at all.

        Everything else that stands beside it is copied, but for subfolders, which hold other adapters or checkpoints.

        Args:
            output: A folder that does not exist.
            replaced: New values of some of its tensors, by name; cast to their data types.
        """
        with complete_or_absent(output) as unfinished:
            for path in self.folder.iterdir():
                if path.is_file() and path.name != TENSOR_FILE:
                    shutil.copyfile(path, unfinished / path.name)
            if self.is_converted:
                text = json.dumps(self.settings, indent=2, sort_keys=True)
                (unfinished / CONFIG_FILE).write_text(text, encoding="utf-8")
            tensors = {
                key: replaced.get(key, tensor).to(tensor.dtype).contiguous() for key, tensor in self.tensors.items()
            }
            save_file(tensors, unfinished / TENSOR_FILE, metadata=self._metadata)


class LoraTensors:
    """Sorts the tensors of a saved adapter by the parameter that they tune, told from their names; no base is loaded.

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


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"adapter: {str(folder)!r} holds no {CONFIG_FILE}; is it a folder that PEFT saved?")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"adapter: {str(path)!r} is no adapter configuration ({error!r})") from error
    return settings


def _read_config(folder: Path) -> Any:  # noqa: ANN401 - a configuration of PEFT
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
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


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    path = folder / TENSOR_FILE
    if not path.is_file():
        raise AdapterError(
            f"adapter: {str(folder)!r} holds no {TENSOR_FILE}; save the adapter with safe_serialization=True"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    except (OSError, SafetensorError) as error:
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
