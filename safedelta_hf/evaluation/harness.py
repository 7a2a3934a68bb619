"""Tasks of the Language Model Evaluation Harness, where `lm_eval` is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn
from transformers import PreTrainedTokenizerBase

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.inference import evaluating
from safedelta_hf.evaluation.result import CONFIDENCE, Score, normal_deviate

PREFIX: Final = "lm_eval/"
"""What the name of every score begins with: `lm_eval/<task>/<metric>`."""


def harness_scores(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = True,
) -> dict[str, Score]:
    """Run tasks of the harness on a model in memory.

    Args:
        model: A causal language model, adapters included; it is left as it was.
        processing_class: Its tokenizer.
        tasks: Names of tasks or groups, as `lm_eval` knows them.
        include: Folder with task files of one's own.
        limit: Examples per task; None for all.
        batch_size: Examples per forward pass.
        apply_chat_template: Whether prompts go through the tokenizer's chat template.

    Returns:
        One score for each task and metric, with the harness's standard error as the interval.

    Raises:
        ConfigurationError: `lm_eval` is not installed, or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigurationError(
            f'lm_eval: its tasks need the package lm_eval ({error}); pip install "lm_eval[hf]"'
        ) from error
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigurationError(f"lm_eval: knows no task {', '.join(unknown)}; `lm_eval ls tasks` lists them")
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=processing_class, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            apply_chat_template=apply_chat_template,
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
            name = f"{PREFIX}{task}/{metric}" + ("" if chosen == "none" else f"/{chosen}")
            scores[name] = _score(float(value), count, values.get(f"{metric}_stderr,{chosen}"))
    return scores


def _score(value: float, count: int, error: Any) -> Score:  # noqa: ANN401
    if not isinstance(error, int | float):  # "N/A" where the harness has none
        return Score(value=value, count=count, unit="")
    spread = normal_deviate(CONFIDENCE) * error
    return Score(value=value, count=count, low=value - spread, high=value + spread, unit="")
