"""Adjust an adapter: the same rank in and out, and the base never changed."""

import copy
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safedelta_hf.adapter.store import AdapterInMemory
from safedelta_hf.adjust.loop import adjust_weights
from safedelta_hf.adjust.plan import plan_parameters
from safedelta_hf.adjust.settings import opened_settings
from safedelta_hf.capture.without_data import profile_without_data
from safedelta_hf.deltas.lora_deltas import FullDelta, by_parameter
from safedelta_hf.deltas.lora_layers import adapter_config, lora_deltas
from safedelta_hf.deltas.lora_settings import initialised_from_base, require_low_rank
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError, ProfileError, naming_foreign_errors, require_kind
from safedelta_hf.modules.adapters import active_adapters
from safedelta_hf.modules.names import class_name, parameter_aliases, unwrapped
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.plan import Plan, Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule
from safedelta_hf.weights.digest import fingerprint, parameter_digest
from safedelta_hf.weights.readers import WeightReader, base_digest, open_base, verified


@naming_foreign_errors("adjusting the adapter")
def adjust_adapter(
    model: nn.Module | ShardedModel,
    *,
    profile: SafetyProfile | str | Path | None = None,
    rule: Rule | str | None = None,
    task_profile: SafetyProfile | str | Path | None = None,
    adapter_name: str = "default",
    new_adapter_name: str | None = None,
    base: nn.Module | str | Path | WeightReader | None = None,
    treatment: Treatment | None = None,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Adjust a LoRA adapter, in place or as a second adapter beside it: all of it, or, if anything fails, nothing.

    `D = s B A` becomes `D T = s B (A T)`: rank, shapes, data types and configuration stay, and no weight of the base is
    read but to make sure that it is the profile's.

    Args:
        model: The model with the adapter on it, unmerged, opened or not. Where it is sharded, or the run has several
            processes, all of them call this; the adapter's own tensors are brought together, those of the base are not.
        profile: Profile of its base, or the folder of one; None for a rule that needs no safety data, such as
            `Scale(strength=1.0)`.
        rule: Which part of each delta to keep, or the name of a rule; `TaskRidge()` with a
            `task_profile`, else `Ridge()`, if None.
        task_profile: Profile of that base on examples of the fine-tuning data, or its folder, for rules that weigh
            them.
        adapter_name: The adapter.
        new_adapter_name: Name of a new adapter for the result; None to adjust in place. It is not activated.
        base: The base as it was before training, for adapters that train biases of the base itself (`bias="all"`).
        treatment: What to do with tuned parameters other than linear weights.
        workspace: Folder with room for a temporary copy of the adapter; None for the system's default.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter that the adapter tunes.

    Raises:
        AdapterError: There is no such adapter, it is merged, or it has no delta `s B A`.
        ProfileError: The profile was made for another base.
        SafeDeltaError: Named by parameter. Whatever was raised, the adapter is as it was.
    """
    _require_kinds(model, adapter_name, new_adapter_name, base)
    opened = open_model(model)
    config = require_adjustable(opened.model, adapter_name)
    settings = opened_settings(
        "adjust_adapter",
        profile,
        rule,
        task_profile,
        treatment,
        workspace,
        without_data=lambda: profile_without_data(opened, _digests(opened, config, base)),
    )
    if settings.rule.auto is not None:
        _require_active(opened.model, adapter_name, new_adapter_name)
    header = settings.profile.header
    in_place = _trained_in_place(opened, config, header, base)
    require_base(opened, header, but={delta.parameter for delta in in_place})
    with _copied_to(opened, config, adapter_name, new_adapter_name) as (tuned, name):
        store = AdapterInMemory(
            [*lora_deltas(tuned, name), *in_place],
            tuned,
            settings.workspace,
            name=name,
            architecture=class_name(tuned.model),
        )
        plan = plan_parameters(store.shapes, settings.profile, settings.treatment, parameter_aliases(tuned.model))
        return adjust_weights(store, plan, settings.profile, settings.rule, task=settings.task, progress=progress)


def _require_kinds(model: object, name: object, new_name: object, base: object) -> None:
    owner = "adjust_adapter"
    require_kind(owner, "model", model, (nn.Module, ShardedModel), "a model")
    require_kind(owner, "adapter_name", name, str, "the name of an adapter")
    require_kind(owner, "new_adapter_name", new_name, (str, type(None)), "a name")
    if not (hasattr(base, "read") and hasattr(base, "source")):
        require_kind(owner, "base", base, (nn.Module, str, Path, type(None)), "a model, or the folder of one")


def plan_adapter(
    model: nn.Module | ShardedModel, profile: SafetyProfile, treatment: Treatment, adapter_name: str = "default"
) -> Plan:
    """Decide what happens to each parameter that an adapter tunes, from names and shapes alone.

    Args:
        model: The model with the adapter on it.
        profile: Profile of its base.
        treatment: What to do with tuned parameters other than linear weights.
        adapter_name: The adapter.

    Returns:
        One entry for each of them.

    Raises:
        AdapterError: There is no such adapter, it is merged, it has no delta `s B A`, or it tunes a parameter twice.
        ProfileError: The profile knows nothing of one of the parameters.
    """
    opened = open_model(model)
    config = require_adjustable(opened.model, adapter_name)
    shapes = {name: delta.shape for name, delta in by_parameter(lora_deltas(opened, adapter_name)).items()}
    if config.bias != "none":
        shapes |= {name: shape for name, shape in opened.shapes.items() if opened.live(name).requires_grad}
    return plan_parameters(shapes, profile, treatment, parameter_aliases(opened.model))


def require_adjustable(model: nn.Module, adapter_name: str) -> Any:  # noqa: ANN401 - a configuration of PEFT
    """Make sure that an adapter can be adjusted as it stands.

    Args:
        model: The model with the adapter on it.
        adapter_name: The adapter.

    Returns:
        Its configuration.

    Raises:
        AdapterError: There is no such adapter, it is merged, or it has no delta `s B A` relative to its base.
    """
    config = adapter_config(model, adapter_name)
    require_low_rank(config)
    if initialised_from_base(config):
        raise AdapterError(
            f"adapter {adapter_name!r}: init_lora_weights={config.init_lora_weights!r} took a part of the base into "
            "the adapter, so its delta is relative to what it started from and has twice the rank; save the adapter "
            "and use adjust_adapter_files(..., initial_adapter=<the adapter as it was before training>)"
        )
    return config


def require_base(model: ShardedModel, header: ProfileHeader, *, but: Set[str] = frozenset()) -> None:
    """Make sure that the frozen weights below an adapter are those that a profile was made of.

    Args:
        model: The model that has the adapter.
        header: What the profile was made from.
        but: Names of parameters that were trained in place.

    Raises:
        ProfileError: It was made of others.
    """
    strangers = sorted(set(model.names) ^ set(header.base))
    if strangers:
        raise ProfileError(
            f"profile: made for another base ({header.architecture}); it differs from this "
            f"{class_name(model.model)} in {', '.join(strangers[:3])}"
        )
    for name in model.names:
        if name not in but and parameter_digest(model, name, getattr(torch, header.dtypes[name])) != header.base[name]:
            raise ProfileError(
                f"profile: made for another base: {name} differs below the adapter; collect a profile of this base, in "
                "the same precision"
            )


def _digests(
    model: ShardedModel,
    config: Any,  # noqa: ANN401
    base: nn.Module | str | Path | WeightReader | None,
) -> dict[str, str]:
    # What lies below the adapter is the base, but for biases that it trained in place.
    found = fingerprint(model)
    if config.bias == "none":
        return found
    if base is None:
        raise AdapterError(
            f"profile: the adapter (bias={config.bias!r}) trains biases of the base itself, so nothing tells what they "
            "were; pass base=<the model or folder that the fine-tuning started from>, or a profile of it"
        )
    reader = open_base(base, unwrapped(model.model)) if isinstance(base, nn.Module | str | Path) else base
    for name in found:
        if name.endswith("bias") and reader.holds(name):
            found[name] = base_digest(reader, name, model)
    return found


def _trained_in_place(
    model: ShardedModel,
    config: Any,  # noqa: ANN401
    header: ProfileHeader,
    base: nn.Module | str | Path | WeightReader | None,
) -> list[FullDelta]:
    # LoraConfig(bias="all") or "lora_only" trains biases of the base itself.
    if config.bias == "none":
        return []
    deltas: list[FullDelta] = []
    reader = open_base(base, unwrapped(model.model)) if isinstance(base, nn.Module | str | Path) else base
    for name in model.names:
        if not name.endswith("bias") or header.base.get(name) in (None, parameter_digest(model, name)):
            continue
        if reader is None:
            raise AdapterError(
                f"{name}: the adapter (bias={config.bias!r}) trained it in place, so its base value is not in the "
                "model; pass base=<the model or folder that the fine-tuning started from>"
            )
        weight = verified(reader, name, header.dtypes[name], header.base[name], model)
        deltas.append(
            FullDelta(
                parameter=name,
                shape=tuple(model.shape(name)),
                tensors={name: model.gather(name)},
                base=model.assembled(name, weight),
            )
        )
    return deltas


def _require_active(model: nn.Module, name: str, new_name: str | None) -> None:
    active = active_adapters(model)
    if new_name is not None or active != [name]:
        raise AdapterError(
            f"strength='auto' measures the model with its active adapter ({', '.join(active)}), which has to be the "
            f"one that is adjusted, in place; call set_adapter({name!r}) without new_adapter_name, or give a number"
        )


def _require_room(model: nn.Module, config: Any, new_name: str) -> None:  # noqa: ANN401
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise AdapterError(f"new_adapter_name={new_name!r}: only a PeftModel takes one, this is {type(model).__name__}")
    if new_name in model.peft_config:
        raise AdapterError(f"new_adapter_name={new_name!r}: this model has an adapter of that name; choose another")
    if config.bias != "none":
        raise AdapterError(
            f"new_adapter_name={new_name!r}: the adapter (bias={config.bias!r}) trains biases of the base itself, "
            "which cannot be in two states; adjust it in place"
        )


@contextmanager
def _copied_to(
    model: ShardedModel,
    config: Any,  # noqa: ANN401
    name: str,
    new_name: str | None,
) -> Iterator[tuple[ShardedModel, str]]:
    """A model and the name of the adapter that is changed: a copy beside the other if one is named, gone on failure."""
    if new_name is None:
        yield model, name
        return
    bare: Any = model.model
    _require_room(bare, config, new_name)
    try:
        # The values are overwritten below, so a costly or data-driven initialisation is left out.
        bare.add_adapter(new_name, _with(config, init_lora_weights=True))
        bare.peft_config[new_name] = _with(config)
        both = open_model(bare)
        for old, new in zip(lora_deltas(model, name), lora_deltas(both, new_name), strict=True):
            for source, target in zip(old.tensors.values(), new.tensors, strict=True):
                both.live(target).data = source.detach().clone()
        yield both, new_name
    except BaseException:
        if new_name in bare.peft_config:
            bare.delete_adapter(new_name)
        raise


def _with(config: Any, **changes: Any) -> Any:  # noqa: ANN401
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(changed, key, value)
    return changed
