"""Safety data in every form that TRL takes, read into token sequences with their response marked."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from safedelta_hf.errors import DataError

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

IGNORED = -100
"""Label of a token that is not part of the response."""

FORMS = "'messages', 'prompt' + 'completion', 'text', or 'input_ids' (+ 'labels')"


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
    source: str | Path | Iterable[Mapping[str, Any]],
    processing_class: ProcessingClass | None = None,
    max_length: int | None = None,
    *,
    purpose: str = "safety data",
) -> list[SafetySequence]:
    """Tokenise safety data: prompts together with the responses of a safe model, usually refusals.

    Task data and ordinary data are read in the same way.

    Args:
        source: A `datasets.Dataset`, a list of dicts, or the path of a JSON-lines file, whose rows hold `messages`,
            `prompt` + `completion`, `text`, or `input_ids` (+ `labels`), as in TRL.
        processing_class: Tokenizer, or processor with a `tokenizer`; not needed for tokenised rows.
        max_length: Sequences are cut to this many tokens, at the end; None leaves them whole.
        purpose: What errors call the data.

    Returns:
        The sequences, in the order of the source.

    Raises:
        DataError: There are no rows, a row has no known form, no response, or none left within `max_length`.
    """
    tokenizer = _tokenizer_of(processing_class)
    try:
        sequences = _cut([_tokenise(number, row, tokenizer) for number, row in enumerate(_rows(source))], max_length)
    except DataError as error:
        raise error.at(purpose) from error
    return sequences


def _cut(sequences: list[SafetySequence], max_length: int | None) -> list[SafetySequence]:
    if not sequences:
        raise DataError("it is empty; give at least one prompt with the response to preserve")
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
    tokenizer = _tokenizer_of(processing_class)
    if tokenizer is None:
        return None
    content = [
        sorted(tokenizer.get_vocab().items()),
        sorted(map(str, tokenizer.all_special_tokens)),
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _tokenizer_of(processing_class: ProcessingClass | None) -> PreTrainedTokenizerBase | None:
    if isinstance(processing_class, ProcessorMixin):
        tokenizer: PreTrainedTokenizerBase = processing_class.tokenizer
        return tokenizer
    return processing_class


def _require_responses(sequences: Sequence[SafetySequence], complaint: str) -> None:
    without = [
        number for number, sequence in enumerate(sequences) if all(label == IGNORED for label in sequence.labels)
    ]
    if without:
        shown = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
        raise DataError(f"{len(without)} of {len(sequences)} rows {complaint} (rows {shown})")


def _rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; give a JSON-lines file, a Dataset or a list")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name} line {number} is not JSON ({error})") from error
    return rows


def _tokenise(number: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> SafetySequence:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} is a {type(row).__name__}, not a dict with {FORMS}")
    if row.get("input_ids") is not None:
        return _from_tokens(number, row)
    if tokenizer is None:
        raise DataError(
            f"row {number} is not tokenised and there is no tokenizer; "
            "pass processing_class=tokenizer (to the Trainer or to the callback)"
        )
    if row.get("messages") is not None:
        messages = list(row["messages"])
        if not messages or messages[-1].get("role") != "assistant" or not messages[-1].get("content"):
            raise DataError(f"'messages' of row {number} must end with a non-empty assistant turn")
        return _from_turns(number, messages[:-1], messages, row, tokenizer)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return _from_text(prompt, completion, tokenizer)
        return _from_turns(number, list(prompt), [*prompt, *completion], row, tokenizer)
    if row.get("text") is not None:
        return _from_text("", row["text"], tokenizer)
    raise DataError(f"row {number} has the keys {sorted(row)}; expected {FORMS}")


def _from_tokens(number: int, row: Mapping[str, Any]) -> SafetySequence:
    input_ids = tuple(int(token) for token in row["input_ids"])
    labels = input_ids if row.get("labels") is None else tuple(int(label) for label in row["labels"])
    mask = [1] * len(input_ids) if row.get("attention_mask") is None else list(row["attention_mask"])
    if not len(labels) == len(input_ids) == len(mask):
        raise DataError(
            f"row {number} has {len(input_ids)} input_ids but {len(labels)} labels and {len(mask)} attention_mask"
        )
    read = [place for place, seen in enumerate(mask) if seen]  # padding is no text
    return SafetySequence(
        input_ids=tuple(input_ids[place] for place in read), labels=tuple(labels[place] for place in read)
    )


def _from_turns(
    number: int,
    prompt: list[Mapping[str, Any]],
    messages: list[Mapping[str, Any]],
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> SafetySequence:
    if not tokenizer.chat_template:
        raise DataError(
            f"row {number} is conversational but the tokenizer has no chat template; "
            "set tokenizer.chat_template, or give 'prompt' and 'completion' as plain strings"
        )
    extra = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}

    def tokens(turns: list[Mapping[str, Any]], *, opens_response: bool) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=opens_response,
            **extra,
        )
        return list(encoded["input_ids"])

    return _mark_response(tokens(prompt, opens_response=True), tokens(messages, opens_response=False))


def _from_text(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> SafetySequence:
    before: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    whole: list[int] = tokenizer(prompt + completion)["input_ids"]
    if completion and tokenizer.eos_token_id is not None and whole[-1:] != [tokenizer.eos_token_id]:
        whole = [*whole, tokenizer.eos_token_id]
    return _mark_response(before, whole)


def _mark_response(before: Sequence[int], whole: Sequence[int]) -> SafetySequence:
    # The response is what follows the longest common prefix of prompt and whole, as in TRL.
    start = 0
    while start < min(len(before), len(whole)) and before[start] == whole[start]:
        start += 1
    return SafetySequence(input_ids=tuple(whole), labels=(IGNORED,) * start + tuple(whole[start:]))
