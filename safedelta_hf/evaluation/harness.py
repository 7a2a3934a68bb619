"""Tasks of the Language Model Evaluation Harness, where `lm_eval` is installed."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from safedelta_hf.data.templates import ProcessingClass, template_of, tokenizer_of
from safedelta_hf.errors import ConfigurationError, extra_needed
from safedelta_hf.evaluation.result import CONFIDENCE, HARNESS, Score, normal_deviate
from safedelta_hf.modules.evaluating import evaluating

"""What the name of every score begins with: `lm_eval/<task>/<metric>`."""


@dataclass(frozen=True, kw_only=True)
class HarnessTasks:
    """What to run.

    Attributes:
        names: Names of tasks or groups, as `lm_eval` knows them.
        include: Folder with task files of one's own.
        limit: Examples per task, the first ones; None for all.

    Raises:
        ConfigurationError: No task is named.
    """

    names: tuple[str, ...]
    include: str | Path | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigurationError("lm_eval: name at least one task")


def require_tasks(tasks: HarnessTasks) -> Any:  # noqa: ANN401 - a class of a package that may be missing
    """Make sure that tasks can be run, before any work is done.

    Args:
        tasks: What to run.

    Returns:
        The `TaskManager` that knows them.

    Raises:
        ConfigurationError: `lm_eval` is not installed, or does not know a task.
    """
    with extra_needed("lm_eval: its tasks need the package lm_eval", "eval"):
        from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=None if tasks.include is None else str(tasks.include))
    unknown = [task for task in tasks.names if task not in manager.all_tasks]
    if unknown:
        raise ConfigurationError(f"lm_eval: knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    return manager


def harness_scores(
    model: nn.Module,
    processing_class: ProcessingClass,
    tasks: HarnessTasks,
    *,
    batch_size: int = 8,
    manager: Any = None,  # noqa: ANN401
) -> dict[str, Score]:
    """Run tasks of the harness on a model in memory, through the tokenizer's chat template if it has one.

    Args:
        model: A causal language model, adapters included; it is left as it was.
        processing_class: Its tokenizer, or its processor.
        tasks: What to run.
        batch_size: Examples per forward pass.
        manager: What `require_tasks` returned for these tasks, if it was called; it takes seconds.

    Returns:
        One score for each task and metric, with the harness's standard error as the interval.

    Raises:
        ConfigurationError: `lm_eval` is not installed, or does not know a task.
    """
    manager = manager or require_tasks(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer is not processing_class:  # the harness asks the tokenizer for the template
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = template_of(processing_class)
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks.names),
            task_manager=manager,
            limit=tasks.limit,
            apply_chat_template=tokenizer.chat_template is not None,
            log_samples=False,
        )
    return scores_of(results)


def scores_of(results: Mapping[str, Any]) -> dict[str, Score]:
    """Read scores off what `lm_eval.simple_evaluate` returns.

    Args:
        results: Its `results` hold, for each task, values under "metric,filter" and standard errors under
            "metric_stderr,filter"; its `n-samples` the numbers of examples.

    Returns:
        Scores by name; the filter is part of the name where it is not "none".
    """
    scores = {}
    for task, values in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, separator, chosen = key.partition(",")
            if not separator or metric.endswith("_stderr") or isinstance(value, str):
                continue
            name = f"{HARNESS}{task}/{metric}" + ("" if chosen == "none" else f"/{chosen}")
            scores[name] = _score(float(value), count, values.get(f"{metric}_stderr,{chosen}"))
    return scores


def _score(value: float, count: int, error: Any) -> Score:  # noqa: ANN401
    if not isinstance(error, int | float):  # "N/A" where the harness has none
        return Score(value=value, count=count, unit="")
    spread = normal_deviate(CONFIDENCE) * error
    return Score(value=value, count=count, low=value - spread, high=value + spread, unit="")
