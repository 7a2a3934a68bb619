"""Polishing: the adjusted weights are trained on, measured, and put back if refusals have become less likely."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Final

import torch
from torch import nn
from transformers import TrainingArguments

from safedelta_hf.capture.collect import DEFAULT_HOLDOUT
from safedelta_hf.data.batches import require_same
from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.data.refusals import HeldOut, require_likelihoods, response_losses, split
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError, DataError, foreign_errors_named, require_kind
from safedelta_hf.modules.adapters import trained_adapter
from safedelta_hf.modules.loading import load_model
from safedelta_hf.polish.config import QUANTILE, PolishConfig
from safedelta_hf.polish.lessons import Lessons, aside, lessons_of, lessons_of_base, mean_divergences
from safedelta_hf.polish.trainer import require_polishable, trained
from safedelta_hf.report.records import PolishRecord
from safedelta_hf.weights.journal import Journal

OWNER: Final = "polish_model"


def polish_model(
    model: nn.Module | ShardedModel,
    safety_dataset: Source,
    *,
    args: TrainingArguments,
    base: nn.Module | str | Path | None = None,
    tuned: nn.Module | str | Path | None = None,
    task_dataset: Source | None = None,
    ordinary_dataset: Source | None = None,
    config: PolishConfig | None = None,
    processing_class: ProcessingClass | None = None,
    max_length: int | None = None,
    workspace: str | Path | None = None,
    progress: bool = True,
) -> PolishRecord:
    """Polish a model that was adjusted, in place; it is left as it was where that fails or is found to be no gain.

    A quarter of the refusals is held out, as `collect_profile` does, and a share of the other rows.

    Args:
        model: The adjusted model, opened or not; of a `PeftModel` the adapter is trained. In a run of several
            processes all of them call this, with the same data.
        safety_dataset: Harmful prompts with refusals, in any form that TRL takes; taught by the base.
        args: Those of the fine-tuning: of them precision, optimiser, batch size, seed and learning rate are taken.
        base: The base model or its folder; None where an adapter is trained, with which disabled the model is the base.
        tuned: The fine-tuned model or its folder, before it was adjusted; with `task_dataset`.
        task_dataset: Examples of the fine-tuning data, taught by the fine-tuned model. Leave out what the base would
            refuse: the fine-tuned model hands on what it does there.
        ordinary_dataset: Ordinary prompts with the base's responses, taught by the base.
        config: How; `PolishConfig()` if None. Its `steps` are a share of `args.max_steps`, unless a whole number.
        processing_class: Tokenizer or processor; not needed for tokenised data.
        max_length: Rows are cut to this many tokens; None leaves them whole.
        workspace: Folder with room for a temporary copy of the trained weights; None for the system's default.
        progress: Whether to show progress bars.

    Returns:
        What was done.

    Raises:
        ConfigurationError: Something is missing, or the model is held in a way in which it cannot be trained further.
        DataError: Rows cannot be read, or there are too few refusals to hold some out.
        SafeDeltaError: It failed; every weight is as it was.
    """
    settings = config or PolishConfig()
    opened = _checked(model, args, base, tuned, task_dataset, settings)
    steps = settings.steps_of(args.max_steps)

    def read(source: Source | None, purpose: str) -> list[SafetySequence]:
        if source is None:
            return []
        found = read_safety_data(source, processing_class, max_length, purpose=purpose)
        require_same(found, opened.ranks, purpose)
        return found

    refusals, held_out = split(read(safety_dataset, SAFETY_DATA), DEFAULT_HOLDOUT)
    if not refusals or not held_out:
        raise DataError(f"{OWNER}: the refusals are too few, or all about one thing, so that none can be held out")
    with foreign_errors_named("polishing the weights"):
        teacher = opened if base is None else open_model(_loaded(base, "base"))
        ordinary = read(ordinary_dataset, "ordinary data")
        lessons = lessons_of_base(
            teacher,
            (refusals, held_out),
            ordinary,
            holdout=settings.holdout,
            top_k=settings.top_k,
            progress=progress,
        )
        measured = HeldOut.measured(teacher, held_out, 8)
        if tuned is not None:
            rows = aside(read(task_dataset, "task data"), settings.holdout)
            teacher = open_model(_loaded(tuned, "tuned"))
            lessons = lessons.beside(lessons_of(teacher, "task", *rows, top_k=settings.top_k, progress=progress))
        del teacher  # a model that was loaded here is let go
        return polish_weights(
            opened,
            lessons,
            measured,
            args,
            settings,
            steps=steps,
            workspace=None if workspace is None else Path(workspace),
            progress=progress,
        )


def _checked(
    model: object, args: object, base: object, tuned: object, task_dataset: object, config: object
) -> ShardedModel:
    require_kind(OWNER, "model", model, (nn.Module, ShardedModel), "a model")
    require_kind(OWNER, "args", args, TrainingArguments, "the TrainingArguments of the fine-tuning")
    require_kind(OWNER, "config", config, PolishConfig, "a PolishConfig")
    for name, value in (("base", base), ("tuned", tuned)):
        require_kind(OWNER, name, value, (nn.Module, str, Path, type(None)), "a model, or the folder of one")
    if (tuned is None) != (task_dataset is None):
        raise ConfigurationError(f"{OWNER}: tuned teaches the rows of task_dataset; pass both, or neither")
    assert isinstance(model, nn.Module | ShardedModel) and isinstance(args, TrainingArguments)
    opened = open_model(model)
    if base is None and trained_adapter(opened.model, OWNER) is None:
        raise ConfigurationError(f"{OWNER}: pass base=<the base model or its folder>, which teaches it to refuse")
    require_polishable(args, opened, OWNER)
    require_likelihoods(opened.model)
    return opened


def _loaded(source: nn.Module | str | Path, option: str) -> nn.Module:
    return source if isinstance(source, nn.Module) else load_model(str(source), option)[0]


def polish_weights(
    model: ShardedModel,
    lessons: Lessons,
    refusals: HeldOut,
    args: TrainingArguments,
    config: PolishConfig,
    *,
    steps: int,
    workspace: Path | None = None,
    progress: bool = True,
) -> PolishRecord:
    """Polish an adjusted model in place; it is left as it was where that fails or refusals suffer.

    Args:
        model: The adjusted model, on all ranks; what requires gradients is trained.
        lessons: What it learns.
        refusals: Refusals that were held out, and how likely the base finds them in this module.
        args: Of the fine-tuning.
        config: Settings.
        steps: Number of optimiser steps.
        workspace: Folder with room for a temporary copy of the trained weights.
        progress: Whether to show progress bars.

    Returns:
        What was done.
    """
    with Journal(workspace, model.ranks) as journal, model.ranks.together():
        before, rise_before = _measured(model, lessons, refusals)
        for name in model.all_names:
            if model.live(name).requires_grad:
                parameter = model.parameter(name)
                journal.replace(parameter, parameter.read())
        if steps:
            with model.ranks.within_collectives():
                trained(model, lessons, args, config, steps, progress=progress)
        after, rise_after = _measured(model, lessons, refusals)
        reason = _why_undone(before, after, rise_before, rise_after, config.tolerance)
        if reason:
            journal.restore()
    return PolishRecord(
        outcome="undone" if reason else "kept",
        steps=steps,
        learning_rate=args.learning_rate * config.rate,
        rows={kind: len(rows) for kind, rows in lessons.taught.items()},
        before=before,
        after=after,
        rise_before=rise_before,
        rise_after=rise_after,
        tolerance=config.tolerance,
        quantile=QUANTILE,
        examples=len(refusals.sequences),
        reason=reason,
    )


def _why_undone(
    before: Mapping[str, float],
    after: Mapping[str, float],
    rise_before: tuple[float, float],
    rise_after: tuple[float, float],
    allowed: float,
) -> str:
    # NaN passes nothing.
    if not max(rise_after) <= max(allowed, *rise_before):
        return "it made refusals less likely than is allowed"
    if not sum(after.values()) <= sum(before.values()):
        return "it led away from its teachers, on the mean over the kinds of rows that were held out"
    return ""


def _measured(
    model: ShardedModel, lessons: Lessons, refusals: HeldOut
) -> tuple[Mapping[str, float], tuple[float, float]]:
    # How far it is from its teachers, and the mean and a quantile of how much less likely it finds refusals.
    losses = [fmean(tokens) for tokens in response_losses(model, refusals.sequences)]
    rises = torch.tensor(losses, dtype=torch.float64) - torch.tensor(refusals.losses, dtype=torch.float64)
    return mean_divergences(model, lessons), (float(rises.mean()), float(rises.quantile(QUANTILE)))
