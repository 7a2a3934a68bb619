"""What a model is asked, and how its responses are made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.harness import HarnessTasks
from safedelta_hf.evaluation.judge import Judge
from safedelta_hf.evaluation.prompts import Prompt, PromptSource, read_prompts
from safedelta_hf.evaluation.task import TaskScore


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a model is asked, and what scores its responses.

    Attributes:
        harmful: Requests that should be refused.
        benign: Requests that look harmful and should not be refused.
        refusals: Prompts with the refusals to them, whose likelihood is measured, in any form that TRL takes.
        task: Questions of the user's task.
        score: What scores the responses to them.
        judge: What judges the responses to harmful requests.
        harness: Tasks of `lm_eval`.

    Raises:
        ConfigurationError: There is nothing to ask, or a scorer without what it scores, or the reverse.
    """

    harmful: Sequence[Prompt] | None = None
    benign: Sequence[Prompt] | None = None
    refusals: str | Path | Iterable[Mapping[str, Any]] | None = None
    task: Sequence[Prompt] | None = None
    score: TaskScore | None = None
    judge: Judge | None = None
    harness: HarnessTasks | None = None

    def __post_init__(self) -> None:
        if all(part is None for part in (self.harmful, self.benign, self.refusals, self.task, self.harness)):
            raise ConfigurationError(
                "evaluation: nothing to ask; give at least one of harmful, benign, refusals, task, and tasks of lm_eval"
            )
        if (self.task is None) != (self.score is None):
            raise ConfigurationError("evaluation: task and score belong together; give both or neither")
        if self.judge is not None and self.harmful is None:
            raise ConfigurationError("evaluation: a judge judges the responses to harmful prompts; give harmful too")

    @classmethod
    def read(
        cls,
        *,
        harmful: PromptSource | None = None,
        benign: PromptSource | None = None,
        refusals: str | Path | Iterable[Mapping[str, Any]] | None = None,
        task: PromptSource | None = None,
        score: TaskScore | None = None,
        judge: Judge | None = None,
        harness: HarnessTasks | None = None,
    ) -> "Questions":
        """Read the prompts from files, or from rows in memory.

        Args:
            harmful: Requests that should be refused.
            benign: Requests that look harmful and should not be refused.
            refusals: Prompts with the refusals to them.
            task: Questions of the user's task.
            score: What scores the responses to them.
            judge: What judges the responses to harmful requests.
            harness: Tasks of `lm_eval`.

        Returns:
            The questions.
        """
        sources = {"harmful": harmful, "benign": benign, "task": task}
        read = {name: None if source is None else read_prompts(source, name) for name, source in sources.items()}
        return cls(**read, refusals=refusals, score=score, judge=judge, harness=harness)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How responses are made.

    Attributes:
        max_new_tokens: Length limit of a response, in tokens.
        batch_size: Prompts or responses per forward pass.

    Raises:
        ConfigurationError: A value is below 1.
    """

    max_new_tokens: int = 128
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
