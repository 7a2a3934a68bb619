"""Which adapters have a delta `s B A` on the weights of their base, told from their configuration alone."""

from dataclasses import fields
from typing import Any

from safedelta_hf.errors import AdapterError

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
