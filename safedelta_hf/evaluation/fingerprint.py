"""What a model's responses depend on, as one digest."""

import hashlib
import json
from typing import Any, Final

from torch import nn

from safedelta_hf.data.dataset import ProcessingClass, tokenizer_digest
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.weights.digest import digest

_INCIDENTAL: Final = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""Parts of a configuration that do not change what the model says, or, like the data type, that its weights tell."""


def model_digest(model: nn.Module, processing_class: ProcessingClass | None) -> str:
    """Digest of weights, buffers, adapters, configuration and tokenizer.

    Args:
        model: The model, with or without adapters.
        processing_class: Its tokenizer or processor, if there is one.

    Returns:
        A hexadecimal SHA-256 digest.

    Raises:
        ConfigurationError: Some weights are offloaded to where they cannot be read.
    """
    offloaded = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if offloaded:
        raise ConfigurationError(
            f"{offloaded[0]} and {len(offloaded) - 1} other weights are offloaded, so the model cannot be told from "
            "others; use devices or memory that hold it whole"
        )
    state = {name: digest(tensor) for name, tensor in sorted(model.state_dict().items())}
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    content = {
        "state": state,
        "config": {key: value for key, value in described.items() if key not in _INCIDENTAL},
        "adapters": {name: _scaling(adapter) for name, adapter in adapters.items()},
        "active": _active(model) if adapters else None,
        "tokenizer": tokenizer_digest(processing_class),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _active(model: nn.Module) -> list[str]:
    # A method of models that load adapters themselves, an attribute of PEFT's.
    active: Any = getattr(model, "active_adapters", [])
    return list(active() if callable(active) else active)


def _scaling(adapter: dict[str, Any]) -> dict[str, Any]:
    # Where an adapter came from, and whether it is to be trained, is no part of what it does.
    incidental = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in adapter.items()
        if key not in incidental
    }
