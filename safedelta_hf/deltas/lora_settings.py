"""The configuration of an adapter: whether it can be loaded, has a delta on weights, and what it says of modules."""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import regex  # type: ignore[import-untyped]

from safedelta_hf.errors import AdapterError

T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"

_PLAIN_VARIANTS = ("velora_config",)
"""Variants of LoRA that only change how it is trained."""

_UNMARKED_VARIANTS = ("use_dora", "alora_invocation_tokens", "use_qalora", "arrow_config")
"""Variants that PEFT has had from before it marked them as such, in 0.20."""

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
        field.name
        for field in fields(config)
        if (field.metadata.get("is_lora_variant") or field.name in _UNMARKED_VARIANTS) and getattr(config, field.name)
    ]


def peft_type(config: Any) -> str:  # noqa: ANN401
    """The kind of adapter.

    Args:
        config: Configuration of the adapter.

    Returns:
        A name such as "LORA".
    """
    return str(getattr(config.peft_type, "value", config.peft_type))


_LARGEST_CONFIG = 32 * 2**20
"""Bytes of a configuration, at most: parsing it takes many times as much memory."""

_LONGEST_PATTERN = 1000
"""Letters of a regular expression, at most; compiling it takes time that no limit interrupts."""

_PATTERN_SECONDS = 1.0
"""Time that a regular expression of a configuration may take on one name; an honest one takes microseconds."""


def _is_whole(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _is_pattern(is_right: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_indices(value: object) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return value is None or all(
        isinstance(indices, list) and all(type(one) is int and 0 <= one < 2**31 for one in indices) for indices in lists
    )


_SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    "peft_type": (lambda value: isinstance(value, str), "a name"),
    "r": (_is_whole, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_is_pattern(_is_whole), "a mapping to whole numbers of at least 1"),
    "alpha_pattern": (_is_pattern(_is_number), "a mapping to numbers"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "use_qalora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda value: isinstance(value, bool | str), "true, false or a name"),
    "target_modules": (lambda value: _are_names(value) or isinstance(value, str), "names or a regular expression"),
    "target_parameters": (_are_names, "names"),
    "modules_to_save": (_are_names, "names"),
    "trainable_token_indices": (_are_indices, "numbers of tokens, or a mapping to them"),
    "base_model_name_or_path": (_is_text, "a name or folder"),
    "revision": (_is_text, "a name"),
}
"""What is looked at of a configuration: whether a value is one, and what it should be."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the configuration of a saved adapter, and make sure that PEFT could load it.

    Args:
        folder: A folder that PEFT wrote.

    Returns:
        What the file says.

    Raises:
        AdapterError: There is none, it is malformed, or a setting has a value that it cannot have.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"adapter: {str(folder)!r} holds no {CONFIG_FILE}; is it a folder that PEFT saved?")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(f"adapter: {str(path)!r} is no adapter configuration (larger than {_LARGEST_CONFIG} bytes)")
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"adapter: {str(path)!r} is no adapter configuration ({error!r})") from error
    for name, (is_right, expected) in _SETTINGS.items():
        if name in settings and not is_right(settings[name]):
            raise AdapterError(
                f"adapter: {name}={_shown(settings[name])} in {str(path)!r}, expected {expected}; PEFT cannot load it "
                "either, save the adapter again"
            )
    return settings


def of_module(module: str, pattern: Mapping[str, T], default: T) -> T:
    """What `rank_pattern` or `alpha_pattern` says of a module, as PEFT reads it.

    Args:
        module: Name of the module in the base model.
        pattern: Values by names of modules, or regular expressions for their ends.
        default: What holds for the others.

    Returns:
        The value of the first that matches.

    Raises:
        AdapterError: One is no regular expression, or takes too long to match.
    """
    return next((value for key, value in pattern.items() if _matches(rf"(.*\.)?({key})$", module)), default)


def is_targeted(module: str, targets: str | list[str] | None) -> bool:
    """Whether PEFT puts an adapter on a module.

    Args:
        module: Name of the module in the base model.
        targets: `target_modules`.

    Returns:
        Whether it is one of them; tensors of others are passed over when PEFT loads a folder.
    """
    if isinstance(targets, str):
        return targets == "all-linear" or _matches(rf"({targets})$", module)
    return any(module == name or module.endswith(f".{name}") for name in targets or ())


def _matches(pattern: str, module: str) -> bool:
    try:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"longer than {_LONGEST_PATTERN} letters")
        return regex.match(pattern, module, timeout=_PATTERN_SECONDS) is not None
    except (regex.error, TimeoutError, ValueError, RecursionError, MemoryError) as error:
        raise AdapterError(
            f"{module}: {pattern[:100]!r} of {CONFIG_FILE} is no regular expression that can be matched "
            f"({str(error) or type(error).__name__}); write the names of modules there"
        ) from error


def _shown(value: object) -> str:
    try:
        return repr(value)[:50]
    except RecursionError:
        return f"a {type(value).__name__} without end"
