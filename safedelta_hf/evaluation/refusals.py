"""Safety data from a model's own mouth: harmful prompts are put to it, and the refusals among its answers kept."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from transformers import PreTrainedModel
from typing_extensions import override

from safedelta_hf.data.phrases import is_refusal
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.generation import Chat, generate_responses, model_digest
from safedelta_hf.evaluation.questions import Prompt, digest_of_prompts
from safedelta_hf.evaluation.result import Score, share
from safedelta_hf.folders import RunLog, write_whole
from safedelta_hf.report.progress import progress_bar

MAX_NEW_TOKENS: Final = 64
"""Length of an answer: whether it refuses is decided in its first words, and short refusals are measured best."""

_SENTENCE: Final = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d\u2019)]*(?=\s|$)")


class Answers(Protocol):
    """Whatever answers chats."""

    fingerprint: str
    """What the answers depend on beside the prompts."""

    def __call__(
        self,
        conversations: Sequence[Chat],
        *,
        known: Mapping[int, str],
        on_batch: Callable[[dict[int, str]], None],
        progress: bool,
    ) -> list[str]:
        """Answer them.

        Args:
            conversations: Chats that end in a user turn.
            known: Answers that are there already, by index of the chat.
            on_batch: Given new answers, by index of the chat, as soon as they are there.
            progress: Whether to show a progress bar.

        Returns:
            One answer for each.
        """


class ModelAnswers(Answers):
    """Answers of a model in this process, by greedy decoding.

    Args:
        model: A causal language model.
        processing_class: Its tokenizer or processor, with a chat template and a padding token.
        max_new_tokens: Length limit of an answer, in tokens.
        batch_size: Chats per call of `model.generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = 8,
    ) -> None:
        self._model, self._processing_class = model, processing_class
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self.fingerprint = f"{model_digest(model, processing_class)}, {max_new_tokens} tokens"

    @override
    def __call__(
        self,
        conversations: Sequence[Chat],
        *,
        known: Mapping[int, str],
        on_batch: Callable[[dict[int, str]], None],
        progress: bool,
    ) -> list[str]:
        return generate_responses(
            self._model,
            self._processing_class,
            conversations,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
            known=known,
            on_batch=on_batch,
            progress=progress,
        )


class ServerAnswers(Answers):
    """Answers of a model behind an address that speaks OpenAI's chat completions, such as vLLM's, at temperature 0.

    Args:
        address: Such as "http://localhost:8000/v1".
        model: What the server calls the model.
        max_new_tokens: Length limit of an answer, in tokens.
        requests: Requests that are open at once.
        api_key: Key for the server, where it asks for one.

    Raises:
        ConfigurationError: The package openai is not installed.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        requests: int = 8,
        api_key: str | None = None,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigurationError(
                f"a server is asked with the package openai ({error}); pip install openai"
            ) from error
        self._client = OpenAI(base_url=address, api_key=api_key or "none")  # servers of one's own take any key
        self._address, self._model = address, model
        self._max_new_tokens, self._requests = max_new_tokens, requests
        self.fingerprint = f"{model} at {address}, {max_new_tokens} tokens"

    @override
    def __call__(
        self,
        conversations: Sequence[Chat],
        *,
        known: Mapping[int, str],
        on_batch: Callable[[dict[int, str]], None],
        progress: bool,
    ) -> list[str]:
        answers = dict(known)
        missing = [index for index in range(len(conversations)) if index not in answers]
        with (
            ThreadPoolExecutor(self._requests) as pool,
            progress_bar(total=len(missing), desc="Asking", unit="prompt", disable=not progress) as bar,
        ):
            for start in range(0, len(missing), self._requests):
                indices = missing[start : start + self._requests]
                texts = pool.map(self._answer, (conversations[index] for index in indices))
                new = dict(zip(indices, texts, strict=True))
                answers.update(new)
                on_batch(new)
                bar.update(len(new))
        return [answers[index] for index in range(len(conversations))]

    def _answer(self, chat: Chat) -> str:
        try:
            completion = self._client.chat.completions.create(
                messages=[dict(message) for message in chat],  # type: ignore[misc]
                model=self._model,
                max_tokens=self._max_new_tokens,
                temperature=0.0,
            )
            return (completion.choices[0].message.content or "").strip()
        except Exception as error:  # whatever the client and the server raise
            raise ConfigurationError(
                f"{self._address} does not answer as model {self._model!r} ({type(error).__name__}: {error}); what was "
                "answered so far is kept, and the same command goes on"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Refusals:
    """What a model refused.

    Attributes:
        rows: Prompts with the refusals to them: `{"messages": [...]}`, as safety data is taken.
        asked: Number of prompts that it was asked.
    """

    rows: tuple[Mapping[str, Any], ...]
    asked: int

    @property
    def share(self) -> Score:
        """Share of the prompts that were refused, with Wilson's 95 % interval."""
        return share([number < len(self.rows) for number in range(self.asked)])

    @property
    def warning(self) -> str:
        """What is wrong with them as safety data; empty if nothing is."""
        if self.share.value < 0.5:
            return (
                f"the model refuses {self.share.value:.0%} of these prompts: it is hardly aligned against them, and "
                "repair can keep no more refusals than it gives. Align it first, or ask what it does refuse"
            )
        if len(self.rows) < ENOUGH:
            return f"{len(self.rows)} refusals are few: about {ENOUGH} of different requests are sensible"
        return ""


ENOUGH: Final = 100
"""Refusals below which safety data is called small."""


def collect_refusals(
    answers: Answers, prompts: Sequence[Prompt], *, log: str | Path | None = None, progress: bool = True
) -> Refusals:
    """Ask harmful prompts and keep the refusals, as safety data.

    An answer refuses if it holds one of `REFUSAL_PHRASES`. One that was cut off by the length limit is cut back to its
    last whole sentence, if that still refuses.

    Args:
        answers: What answers, such as `ModelAnswers`.
        prompts: The prompts, as `read_prompts` gives them.
        log: File that each answer, refusal or not, is appended to, and from which a killed run goes on; None for none.
        progress: Whether to show a progress bar.

    Returns:
        The refusals, in the order of the prompts.

    Raises:
        ConfigurationError: The model or the server cannot answer chats.
        DataError: There are no prompts, or one does not fit the model.
        OutputError: The log is of another model or of other prompts.
    """
    if not prompts:
        raise DataError("there are no prompts to ask")
    made_with = {
        "model": hashlib.sha256(answers.fingerprint.encode()).hexdigest(),
        "prompts": digest_of_prompts(prompts),
    }
    kept = None if log is None else RunLog(Path(log), made_with, _answer)

    def keep(new: dict[int, str]) -> None:
        if kept is not None:
            kept.append(
                *({"index": index, "prompt": prompts[index].text, "response": text} for index, text in new.items())
            )

    responses = answers(
        [prompt.messages for prompt in prompts],
        known={} if kept is None else dict(kept.entries),
        on_batch=keep,
        progress=progress,
    )
    rows = tuple(
        {"messages": [*prompt.messages, {"role": "assistant", "content": whole_sentences(response)}]}
        for prompt, response in zip(prompts, responses, strict=True)
        if is_refusal(response)
    )
    return Refusals(rows=rows, asked=len(prompts))


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as JSON lines; the file is complete or not there.

    Args:
        rows: The rows.
        path: The file.
    """
    write_whole(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def whole_sentences(refusal: str) -> str:
    """Cut a refusal that was broken off back to its last whole sentence.

    Args:
        refusal: The refusal.

    Returns:
        The sentences, as long as they still refuse; else the refusal as it is.
    """
    ends = [match.end() for match in _SENTENCE.finditer(refusal)]
    text = refusal[: ends[-1]] if ends else refusal
    return text if is_refusal(text) else refusal


def _answer(line: Mapping[str, Any]) -> tuple[int, str]:
    return int(line["index"]), str(line["response"])
