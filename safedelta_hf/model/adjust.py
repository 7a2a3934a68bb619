"""Adjusting a model: what is given, put into the loop, and what came of it, put into a report."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from safedelta_hf.adjust.loop import adjust_weights
from safedelta_hf.adjust.plan import plan_parameters
from safedelta_hf.adjust.settings import opened_settings
from safedelta_hf.capture.without_data import profile_without_data
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ProfileError, naming_foreign_errors, require_kind
from safedelta_hf.model.store import ModelStore
from safedelta_hf.modules.names import parameter_aliases, wrapping_told
from safedelta_hf.modules.parametrised import ParametrisedWeight, parametrised_weights
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Plan, Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule
from safedelta_hf.weights.digest import parameter_digest
from safedelta_hf.weights.readers import WeightReader, base_digest, open_base


@naming_foreign_errors("adjusting the weights")
def adjust_model(
    model: nn.Module | ShardedModel,
    *,
    base: nn.Module | str | Path | WeightReader,
    profile: SafetyProfile | str | Path | None = None,
    rule: Rule | str | None = None,
    task_profile: SafetyProfile | str | Path | None = None,
    treatment: Treatment | None = None,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Adjust a fine-tuned model in place: all of it, or, if anything fails, nothing of it.

    Args:
        model: The fine-tuned model, opened or not. Where it is sharded, or the run has several processes, all of them
            call this; each adjusts what it holds.
        base: The base model, a folder or cached repository of its safetensors files, or an open reader.
        profile: Profile of that base, or the folder of one; None for a rule that needs no safety data, such as
            `Scale(strength=1.0)`.
        rule: Which part of each delta to keep, or the name of a rule; `TaskRidge()` with a
            `task_profile`, else `Ridge()`, if None.
        task_profile: Profile of that base on examples of the fine-tuning data, or its folder, for rules that weigh
            them.
        treatment: What to do with parameters other than linear weights.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """
    require_kind("adjust_model", "model", model, (nn.Module, ShardedModel), "a model")
    if not (hasattr(base, "read") and hasattr(base, "source")):
        require_kind("adjust_model", "base", base, (nn.Module, str, Path), "a model, or the folder of one")
    opened = open_model(model)
    reader = open_base(base, opened.model) if isinstance(base, nn.Module | str | Path) else base
    settings = opened_settings(
        "adjust_model",
        profile,
        rule,
        task_profile,
        treatment,
        workspace,
        without_data=lambda: profile_without_data(opened, _digests(opened, reader)),
    )
    plan = plan_model(opened, settings.profile, settings.treatment)
    store = ModelStore(opened, reader, settings.profile.header, settings.workspace)
    return adjust_weights(store, plan, settings.profile, settings.rule, task=settings.task, progress=progress)


def _digests(model: ShardedModel, base: WeightReader) -> dict[str, str]:
    def found(name: str) -> str:
        is_packed = is_quantised(model.live(name))  # none of these can have been moved
        return parameter_digest(model, name) if is_packed else base_digest(base, name, model)

    return {name: found(name) for name in model.names}


def plan_model(model: nn.Module | ShardedModel, profile: SafetyProfile, treatment: Treatment) -> Plan:
    """Decide what happens to each parameter, from names and shapes alone.

    Args:
        model: The model that will be adjusted, or any other of its architecture.
        profile: Profile of its base.
        treatment: What to do with parameters other than linear weights.

    Returns:
        One entry for each parameter; those that read the same moment stand together.

    Raises:
        ProfileError: The profile was made for another architecture.
    """
    opened = open_model(model)
    shapes = opened.shapes
    if set(shapes) != set(profile.header.base):
        strangers = sorted(set(shapes) ^ set(profile.header.base))
        raise ProfileError(
            f"profile: made for {profile.header.architecture} with {len(profile.header.base)} parameters, this is "
            f"{type(opened.model).__name__} with {len(shapes)}; they differ in {', '.join(strangers[:3])}. "
            f"Collect a profile of this model's base{wrapping_told(shapes, profile.header.base)}"
        )
    if profile.header.parametrised:
        shapes = _with_computed(shapes, parametrised_weights(opened.model), profile.header.parametrised)
    return plan_parameters(shapes, profile, treatment, parameter_aliases(opened.model))


def _with_computed(
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, ParametrisedWeight],
    wanted: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[int, ...]]:
    for name, originals in wanted.items():
        if name not in found or set(found[name].originals) != set(originals):
            raise ProfileError(
                f"{name}: the model of the profile computes it from {', '.join(originals)}, this one does not; "
                "collect a profile of this model's base"
            )
    computed = {original for originals in wanted.values() for original in originals}
    own = {name: shape for name, shape in shapes.items() if name not in computed}
    return own | {name: tuple(found[name].shaped().shape) for name in wanted}
