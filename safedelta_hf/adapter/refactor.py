"""Adjust an adapter of any kind that has a delta on weights, and write the result as a plain LoRA."""

from functools import partial
from pathlib import Path

from torch import nn

from safedelta_hf.adapter.adjust import require_base
from safedelta_hf.adapter.merged_layers import merged_deltas, write_lora
from safedelta_hf.adapter.store import AdapterInFiles
from safedelta_hf.adjust.loop import adjust_weights
from safedelta_hf.adjust.plan import plan_parameters, require_number
from safedelta_hf.deltas.lora_layers import adapter_config
from safedelta_hf.deltas.lora_settings import require_weight_delta
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError, naming_foreign_errors
from safedelta_hf.modules.names import class_name, parameter_aliases
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, default_rule


@naming_foreign_errors("adjusting the adapter", "nothing was written")
def refactor_adapter(
    model: nn.Module,
    *,
    output: str | Path,
    rank: int,
    profile: SafetyProfile,
    rule: Rule | None = None,
    task_profile: SafetyProfile | None = None,
    adapter_name: str = "default",
    treatment: Treatment | None = None,
    progress: bool = True,
) -> Report:
    """Adjust an adapter that is no product `B A`, and write the adjusted delta as a LoRA of a given rank.

    For DoRA and other variants of LoRA, LoHa, LoKr, VeRA, OFT, IA3 and every other tuner that PEFT can merge into a
    weight. The delta of each layer is what merging a copy of it changes, so nothing of the tuner is approximated; the
    LoRA is the nearest of its rank, and the report says per layer what that leaves out. Costs a singular value
    decomposition for each layer.

    Args:
        model: The model with the adapter on it, unmerged, held whole by this process; it is not changed.
        output: Folder of the LoRA that is written; must not exist.
        rank: Its rank. The rank of the smaller side of a layer leaves nothing out.
        profile: Profile of the base.
        rule: Which part of each delta to keep, at a strength that is a number, so it has to be given: the default,
            `TaskRidge()` with `task_profile` and else `Ridge()`, is measured.
        task_profile: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        adapter_name: The adapter.
        treatment: What to do with tuned parameters other than linear weights.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter that the adapter tunes; its losses are those before the rank was cut.

    Raises:
        ConfigurationError: The strength is to be measured.
        AdapterError: The adapter has no delta on weights, or not only on matrices, or the output exists.
        ProfileError: The profile was made for another base.
        SafeDeltaError: Named by parameter. Whatever was raised, there is no output.
    """
    rule = rule or default_rule(task_profile)
    require_number(rule)
    if rank < 1:
        raise AdapterError(f"rank={rank!r} must be at least 1")
    config = adapter_config(model, adapter_name)
    opened = open_model(model)
    if hasattr(config, "init_lora_weights"):
        require_weight_delta(config)
    if getattr(config, "bias", "none") != "none":
        raise AdapterError(
            f"adapter {adapter_name!r}: bias={config.bias!r} trains biases of the base itself, which a LoRA cannot "
            "hold; merge it and use adjust_model"
        )
    if Path(output).exists():
        raise AdapterError(f"output: {str(output)!r} exists already; remove it or choose another folder")
    deltas = merged_deltas(opened, adapter_name, rank)
    require_base(opened, profile.header)
    fields = ("base_model_name_or_path", "revision", "task_type", "modules_to_save")
    settings = {field: getattr(config, field, None) for field in fields}
    store = AdapterInFiles(
        deltas,
        partial(write_lora, Path(output), deltas, settings),
        architecture=class_name(model),
        source="the frozen base below the adapter",
    )
    plan = plan_parameters(store.shapes, profile, treatment or Treatment(), parameter_aliases(model))
    return adjust_weights(store, plan, profile, rule, task=task_profile, progress=progress)
