"""Adjusting a model: what is given, put into the loop, and what came of it, put into a report."""

from pathlib import Path

from torch import nn

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.pipeline.loop import Adjustment, RunningModel
from safedelta_hf.pipeline.plan import plan_model
from safedelta_hf.ranks import Ranks
from safedelta_hf.records import Plan, RuleRecord, Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, default_rule
from safedelta_hf.sharding.held import HeldModel
from safedelta_hf.weights.base import BaseWeights, open_base
from safedelta_hf.weights.model import ModelStore
from safedelta_hf.weights.store import WeightStore


def adjust_model(
    model: nn.Module,
    *,
    base: nn.Module | str | Path | BaseWeights,
    profile: SafetyProfile,
    rule: Rule | None = None,
    task: SafetyProfile | None = None,
    treatment: Treatment | None = None,
    workspace: Path | None = None,
    progress: bool = True,
) -> Report:
    """Adjust a fine-tuned model in place: all of it, or, if anything fails, nothing of it.

    Args:
        model: The fine-tuned model. Where it is sharded, or the run has several processes, all of them call this; each
            adjusts what it holds.
        base: The base model, a folder or cached repository of its safetensors files, or an open reader.
        profile: Profile of that base.
        rule: Which part of each delta to keep; `TaskRidge()` with a `task`, else `Ridge()`, if None.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        treatment: What to do with parameters other than linear weights.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """  # noqa: DOC502 - raised by the functions called
    reader = open_base(base, model) if isinstance(base, nn.Module | str | Path) else base
    plan = plan_model(model, profile, treatment or Treatment())
    store = ModelStore(model, reader, profile.header, workspace)
    running = RunningModel(held=HeldModel.of(model), restore=store.restore)
    return adjust_weights(
        store, plan, profile, rule or default_rule(task), task=task, running=running, progress=progress
    )


def adjust_weights(
    store: WeightStore,
    plan: Plan,
    profile: SafetyProfile,
    rule: Rule,
    *,
    task: SafetyProfile | None = None,
    running: RunningModel | None = None,
    progress: bool = True,
) -> Report:
    """Adjust fine-tuned weights wherever they are kept: all of them, or, if anything fails, none.

    Args:
        store: The weights.
        plan: What will be done with each parameter of the store.
        profile: Profile of their base.
        rule: Which part of each delta to keep.
        task: Profile of that base on examples of the fine-tuning data, for rules that weigh them.
        running: What runs with the weights of the store, for a strength that is to be measured.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter.

    Raises:
        SafeDeltaError: Named by parameter; every weight is as it was.
    """
    ranks = Ranks.of_run()
    with ranks.together():
        loop = Adjustment(store, plan, profile, rule, task, ranks=ranks, progress=progress)
    with store, ranks.together():  # on a failure all ranks leave the store's block, and put back what they hold
        if rule.auto is None:
            search, records = None, loop.at(rule)
        else:
            search, records = loop.measured(rule, rule.auto, running)
    return Report(
        rule=RuleRecord(name=rule.name, settings=rule.settings),
        architecture=store.architecture,
        base=store.source,
        sequences=profile.header.sequences,
        tokens=profile.header.tokens,
        parameters=records,
        search=search,
    )
