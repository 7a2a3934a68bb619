"""Safety data in every form that TRL takes, read into token sequences with their response marked."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from safedelta_hf.data.forms import IGNORED, Turn, answered, in_known_form, is_tokenised, tools_of, turns_of
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.data.rows import is_on_hub, read_rows
from safedelta_hf.data.templates import (
    ProcessingClass,
    conversation_tokens,
    template_of,
    text_tokens,
    tokenizer_of,
)
from safedelta_hf.errors import DataError

Source = str | Path | Iterable[Mapping[str, Any]]
"""What data is read from: the path of a file, a name on the Hub, or rows."""

EMPTY = "it is empty; give at least one prompt with the response to preserve"


@dataclass(frozen=True, kw_only=True)
class SafetySequence:
    """One tokenised example.

    Attributes:
        input_ids: Token ids, [tokens].
        labels: The same ids in the response, `IGNORED` elsewhere, [tokens].
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def read_safety_data(
    source: Source,
    processing_class: ProcessingClass | None = None,
    max_length: int | None = None,
    *,
    purpose: str = SAFETY_DATA,
) -> list[SafetySequence]:
    """Tokenise safety data: prompts together with the responses of a safe model, usually refusals.

    Task data and ordinary data are read in the same way.

    Args:
        source: A `datasets.Dataset`, any iterable of dicts, a file (JSON lines, a JSON array, CSV, Parquet)
            or the name of a data set on the Hub. Rows hold `messages`, `prompt` + `completion`, `text`, or `input_ids`
            (+ `labels`), as in TRL; preferences, whose chosen response counts; or ShareGPT's or Alpaca's columns.
        processing_class: Tokenizer, or processor with a `tokenizer`; not needed for tokenised rows.
        max_length: Sequences are cut to this many tokens, at the end; None leaves them whole.
        purpose: What errors call the data.

    Returns:
        The sequences, in the order of the source; without responses that are marked as undesirable.

    Raises:
        DataError: There are no rows, a row has no known form, no response, or none left within `max_length`, or the
            chat template rejects it or leaves words out.
    """
    try:
        read = [tokenised(row, place, processing_class) for place, row in read_rows(source)]
        sequences = [sequence for sequence in read if sequence is not None]
        if read and not sequences:
            raise DataError(f"all {len(read)} rows are marked as undesirable; there is no response to preserve")
        sequences = _cut(sequences, max_length)
    except DataError as error:
        raise error.at(purpose) from error
    return sequences


def require_source(owner: str, setting: str, source: Any) -> int | None:  # noqa: ANN401 - checked here
    """Stop at what can be no data, before a model or a tokenizer is at hand.

    Args:
        owner: What has the argument, for errors.
        setting: Name of the argument.
        source: As in `read_safety_data`.

    Returns:
        The number of its rows, as far as that is known without the Hub and without going through a Dataset.

    Raises:
        DataError: It is no source of rows, there is no such file, it is empty, or a row has no known form.
    """
    try:
        if isinstance(source, str | Path) and is_on_hub(source):
            return None
        if isinstance(source, Iterable) and not isinstance(source, str | Path | Mapping | list | tuple | bytes):
            return len(source) if isinstance(source, Sized) and not hasattr(source, "iterrows") else None
        rows = read_rows(source)
        if not rows:
            raise DataError(EMPTY)
        for place, row in rows:
            in_known_form(row, place)
    except DataError as error:
        raise error.at(f"{owner}: {setting}") from error
    return len(rows)


def _cut(sequences: list[SafetySequence], max_length: int | None) -> list[SafetySequence]:
    if not sequences:
        raise DataError(EMPTY)
    _require_responses(sequences, "have no response tokens; each row needs the response (refusal) to preserve")
    if max_length is not None:
        sequences = [
            SafetySequence(input_ids=sequence.input_ids[:max_length], labels=sequence.labels[:max_length])
            for sequence in sequences
        ]
        _require_responses(
            sequences, f"have no response left within max_length={max_length}; raise it or shorten the prompts"
        )
    return sequences


def digest_of(sequences: Sequence[SafetySequence]) -> str:
    """Fingerprint of tokenised safety data.

    Args:
        sequences: The sequences.

    Returns:
        A hexadecimal SHA-256 digest.
    """
    content = json.dumps([[sequence.input_ids, sequence.labels] for sequence in sequences])
    return hashlib.sha256(content.encode()).hexdigest()


def tokenizer_digest(processing_class: ProcessingClass | None) -> str | None:
    """Fingerprint of what turns conversations into tokens: vocabulary, special tokens and chat template.

    Args:
        processing_class: Tokenizer, or processor with a `tokenizer`, or None.

    Returns:
        A hexadecimal SHA-256 digest, or None without a tokenizer.
    """
    tokenizer = tokenizer_of(processing_class)
    if tokenizer is None:
        return None
    content = [
        sorted(tokenizer.get_vocab().items()),
        sorted(map(str, tokenizer.all_special_tokens)),
        template_of(processing_class),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def responses_of(sequences: Sequence[SafetySequence], processing_class: ProcessingClass | None) -> list[str]:
    """The responses as text.

    Args:
        sequences: Tokenised examples.
        processing_class: Tokenizer, or processor with a `tokenizer`, or None.

    Returns:
        The text of each, without special tokens; nothing without a tokenizer.
    """
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer is None:
        return []
    said = ([label for label in sequence.labels if label != IGNORED] for sequence in sequences)
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in said]


def _require_responses(sequences: Sequence[SafetySequence], complaint: str) -> None:
    without = [
        number for number, sequence in enumerate(sequences) if all(label == IGNORED for label in sequence.labels)
    ]
    if without:
        shown = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        raise DataError(f"{len(without)} of {len(sequences)} rows {complaint} (rows {shown})")


def tokenised(row: Any, place: str, processing_class: ProcessingClass | None) -> SafetySequence | None:  # noqa: ANN401
    """Tokenise one row.

    Args:
        row: The row, in one of the forms of `read_safety_data`.
        place: Where it stands, for messages.
        processing_class: Tokenizer or processor, or None.

    Returns:
        The sequence; None for a response that is marked as undesirable.

    Raises:
        DataError: It has no known form or no response, or the chat template rejects it or leaves words out.
    """
    if isinstance(row, Mapping) and not is_tokenised(row) and tokenizer_of(processing_class) is None:
        raise DataError(
            f"{place} is not tokenised and there is no tokenizer; "
            "pass processing_class=tokenizer (to the Trainer or to the callback)"
        )
    found = in_known_form(row, place)
    if found is None:
        return None
    if "input_ids" in found:
        return _from_tokens(found, processing_class)
    assert processing_class is not None, "it has a tokenizer"
    if "messages" in found:
        messages = turns_of(found["messages"], place, "'messages'")
        if not answered(messages):
            raise DataError(f"'messages' of {place} must end with a non-empty assistant turn")
        return _from_turns(messages[:-1], messages[-1:], found, place, processing_class)
    prompt, completion = found.get("prompt", ""), found.get("completion", found.get("text"))
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise DataError(f"{place} has a blank response; give the text to preserve")
        return _from_text(prompt, completion, place, processing_class)
    kinds = {type(part).__name__ for part in (prompt, completion) if not hasattr(part, "__iter__")}
    if kinds or isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"{place}: its prompt is a {type(prompt).__name__} and its response a {type(completion).__name__}; give "
            "both as text, or both as lists of messages"
        )
    before, response = turns_of(prompt, place, "'prompt'"), turns_of(completion, place, "'completion'")
    if not answered(response):
        raise DataError(f"'completion' of {place} must end with a non-empty assistant turn")
    return _from_turns(before, response, found, place, processing_class)


def _from_tokens(row: Mapping[str, Any], processing_class: ProcessingClass | None) -> SafetySequence:
    input_ids, labels = row["input_ids"], row["labels"]
    mask = row.get("attention_mask") or _unpadded(input_ids, tokenizer_of(processing_class))
    read = [place for place, seen in enumerate(mask) if seen]  # padding is no text
    return SafetySequence(
        input_ids=tuple(input_ids[place] for place in read), labels=tuple(labels[place] for place in read)
    )


def _unpadded(input_ids: Sequence[int], tokenizer: Any) -> list[bool]:  # noqa: ANN401 - or None
    # Which tokens of a row without an attention mask are text. Where the padding token has another meaning as well,
    # one of it at an end of the row is no padding.
    padding = getattr(tokenizer, "pad_token_id", None)
    shared = padding in (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None))
    before = sum(1 for _ in takewhile(lambda token: token == padding, input_ids))
    after = sum(1 for _ in takewhile(lambda token: token == padding, reversed(input_ids)))
    if shared:
        before, after = before if before > 1 else 0, max(after - 1, 0)
    return [before <= place < len(input_ids) - after for place in range(len(input_ids))]


def _from_turns(
    prompt: list[Turn], response: list[Turn], row: Mapping[str, Any], place: str, processing_class: ProcessingClass
) -> SafetySequence:
    if not template_of(processing_class):
        raise DataError(
            f"{place} is conversational but the tokenizer has no chat template; "
            "set tokenizer.chat_template, or give 'prompt' and 'completion' as plain strings"
        )
    if not prompt:
        raise DataError(f"{place} has no turn before the response; give the request that it answers")
    return _mark_response(*conversation_tokens(processing_class, prompt, response, tools_of(row, place), place))


def _from_text(prompt: str, completion: str, place: str, processing_class: ProcessingClass) -> SafetySequence:
    before = text_tokens(processing_class, prompt, place) if prompt else []
    whole = text_tokens(processing_class, prompt + completion, place)
    end = getattr(tokenizer_of(processing_class), "eos_token_id", None)
    if completion and end is not None and whole[-1:] != [end]:
        whole = [*whole, end]
    return _mark_response(before, whole)


def _mark_response(before: Sequence[int], whole: Sequence[int]) -> SafetySequence:
    # The response is what follows the longest common prefix of prompt and whole, as in TRL.
    start = 0
    while start < min(len(before), len(whole)) and before[start] == whole[start]:
        start += 1
    return SafetySequence(input_ids=tuple(whole), labels=(IGNORED,) * start + tuple(whole[start:]))
