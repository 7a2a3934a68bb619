"""What a model is asked, and where the questions come from."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safedelta_hf.data.dataset import Source
from safedelta_hf.data.forms import text_of, turns_of, turns_of_row
from safedelta_hf.data.rows import kept, read_rows
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.harness import HarnessTasks
from safedelta_hf.evaluation.scoring import Judge, TaskScore

FORMS = "'messages', or 'prompt'"

PromptSource = str | Path | Iterable[Any]
"""What prompts are read from: the path of a file, or rows."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A chat that waits for a response.

    Attributes:
        messages: Messages with "role" and "content", the last of them the user's.
        row: The row that it was read from, with whatever else that holds, such as the right answer.
    """

    messages: tuple[Mapping[str, Any], ...]
    row: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What the user said last."""
        return text_of(self.messages[-1])


def read_prompts(source: PromptSource, name: str = "prompts") -> list[Prompt]:
    """Read prompts from a file, or from rows in memory.

    A row holds `messages` (a chat that ends in a user turn; the last turn is dropped where it is the assistant's),
    `prompt` (a string, or such a chat), or ShareGPT's or Alpaca's columns. A row that is a string is a prompt itself.
    In a file of text each line is a row: JSON where it begins with a brace, else plain text. Blank lines are skipped.

    Args:
        source: Path of a file, name of a data set on the Hub, or rows, as for safety data; prompts that were read
            before are taken as they are.
        name: What the prompts are for, for messages.

    Returns:
        The prompts, in their order.

    Raises:
        DataError: There is no such file, a row is not what it should be, or there is no prompt.
    """
    try:
        prompts = [_prompt(row, place) for place, row in read_rows(source, plain=True)]
        if not prompts:
            raise DataError("there are no prompts; give at least one")
    except DataError as error:
        raise error.at(name) from error
    return prompts


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Fingerprint of prompts: of the chats, not of what else their rows hold.

    Args:
        prompts: The prompts.

    Returns:
        A hexadecimal SHA-256 digest.
    """
    content = json.dumps([[dict(message) for message in prompt.messages] for prompt in prompts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _prompt(row: Any, place: str) -> Prompt:  # noqa: ANN401
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is a {type(row).__name__}, not text or a dict with {FORMS}")
    asked = turns_of_row(row, place)
    if asked is None:
        given = row.get("prompt")
        if given is None:
            raise DataError(f"{place} has the keys {sorted(map(str, row))}; expected {FORMS}")
        asked = turns_of([{"role": "user", "content": given}] if isinstance(given, str) else given, place, "'prompt'")
    if asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked or asked[-1]["role"] != "user" or not text_of(asked[-1]).strip():
        raise DataError(f"{place}: a prompt has to end in a user turn with some text")
    return Prompt(messages=tuple(asked), row=row)


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
    refusals: Source | None = None
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
            raise ConfigurationError("evaluation: task questions and score belong together; give both or neither")
        if self.judge is not None and self.harmful is None:
            raise ConfigurationError("evaluation: a judge judges the responses to harmful prompts; give harmful too")

    @classmethod
    def read(
        cls,
        *,
        harmful: PromptSource | None = None,
        benign: PromptSource | None = None,
        refusals: Source | None = None,
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
        return cls(**read, refusals=kept(refusals), score=score, judge=judge, harness=harness)


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
