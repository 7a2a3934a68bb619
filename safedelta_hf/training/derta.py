"""DeRTa: train a model to refuse at every position of a harmful reply (arXiv 2407.09121)."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.errors import ConfigurationError, DataError, warn
from safedelta_hf.rules.rule import require_number
from safedelta_hf.training.rows import (
    OVER_REFUSAL,
    closing_length,
    in_place_of,
    required_tokenizer,
    rows_of,
    special_ids,
    to_dataset,
)

if TYPE_CHECKING:
    from datasets import Dataset

Prefix = Literal["random", "none"]

REFUSAL: Final = "Sorry, I can't help with that."
"""What the first token of a refusal is taken from."""


class _Triple(NamedTuple):
    """A prompt with a safe and a harmful reply, tokenised; the harmful one apart from what ends it."""

    prompt: tuple[int, ...]
    safe: tuple[int, ...]
    harmful: tuple[int, ...]
    closing: tuple[int, ...]


def derta_rows(
    triples: Source,
    processing_class: ProcessingClass,
    *,
    refusal: str = REFUSAL,
    prefix: Prefix = "random",
    keep: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
) -> "Dataset":
    """Make two rows of each triple of prompt `q`, safe reply `r` and harmful reply `h` (Eq. 2 of the paper).

    The first row is `q + h[:k] + r` with `k` uniform in 0 ... |h|, its loss on `r` and what ends it: refuse even after
    the beginning of a harmful reply. The second is `q + h` and the end of the turn, labelled with the first token of a
    refusal at every position of the reply and at its end: be ready to refuse at any moment.

    Args:
        triples: Rows with `prompt`, `chosen` (safe) and `rejected` (harmful), conversational or plain, as TRL's
            preference data: a Dataset, a list of dicts, or the path of a JSON-lines file.
        processing_class: Tokenizer or processor.
        refusal: A refusal; its first token, as it follows the prompt, is the label of the second rows.
        prefix: "random" draws `k`; "none" leaves it 0, for comparison.
        keep: Share of the second row's labels that is kept, drawn at random, at least one in each row. The authors keep
            0.05 for full fine-tuning and all for LoRA.
        max_length: Longest row in tokens. The harmful reply is shortened, never the prompt or the safe reply.
        seed: Of what is drawn; each row depends on it and its place alone.

    Returns:
        Two rows for each triple, in their order, with `input_ids`, `attention_mask` and `labels`.

    Raises:
        ConfigurationError: A setting is outside its range, or the refusal has no first token of its own.
        DataError: A row is no triple, or does not fit into `max_length`.
    """
    if prefix not in get_args(Prefix):
        raise ConfigurationError(f"derta_rows: prefix={prefix!r} is not one of {', '.join(get_args(Prefix))}")
    require_number("derta_rows", "keep", keep, "above 0 and at most 1", lambda share: 0 < share <= 1)
    given = _read(triples)
    refuses = _first_token(given, refusal, processing_class)
    rows: list[SafetySequence] = []
    for number, triple in enumerate(_tokenised(given, processing_class)):
        draw = random.Random(f"derta {seed} {number}")
        limit = math.inf if max_length is None else max_length
        rows.append(_after_prefix(number, triple, limit, draw, prefix))
        rows.append(_transition(number, triple, limit, draw, keep, refuses))
    warn(
        f"derta_rows: alone they teach to refuse everything; mix them into other rows (mix_safety), and {OVER_REFUSAL}"
    )
    return to_dataset(rows)


def _after_prefix(number: int, triple: _Triple, limit: float, draw: random.Random, prefix: Prefix) -> SafetySequence:
    room = limit - len(triple.prompt) - len(triple.safe)
    if room < 0:
        raise DataError(
            f"triples: row {number}: prompt and safe reply have {len(triple.prompt) + len(triple.safe)} tokens, more "
            f"than max_length={limit}; raise it, or shorten them"
        )
    length = draw.randint(0, int(min(len(triple.harmful), room)))
    before = triple.prompt + triple.harmful[: length if prefix == "random" else 0]
    return SafetySequence(input_ids=before + triple.safe, labels=(IGNORED,) * len(before) + triple.safe)


def _transition(
    number: int, triple: _Triple, limit: float, draw: random.Random, keep: float, refuses: int
) -> SafetySequence:
    prompt = len(triple.prompt)
    tokens = (triple.prompt + triple.harmful + triple.closing)[: None if limit == math.inf else int(limit)]
    # What a template puts after the end of the turn is never the model's to say.
    last = min(len(tokens), prompt + len(triple.harmful) + min(1, len(triple.closing)))
    if last <= prompt:
        raise DataError(f"triples: row {number}: max_length={limit} leaves nothing of the harmful reply; raise it")
    kept = set(draw.sample(range(prompt, last), max(1, math.ceil(keep * (last - prompt)))))
    labels = tuple(refuses if place in kept else IGNORED for place in range(len(tokens)))
    return SafetySequence(input_ids=tokens, labels=labels)


def _read(triples: Source) -> list[Mapping[str, Any]]:
    rows = rows_of(triples, "triples")
    for number, row in enumerate(rows):
        missing = [key for key in ("prompt", "chosen", "rejected") if not row.get(key)]
        if missing:
            raise DataError(
                f"triples: row {number} has no {' and no '.join(missing)}; expected 'prompt', 'chosen' (the safe "
                "reply) and 'rejected' (the harmful one), as strings or as messages"
            )
    return rows


def _replies(
    given: Sequence[Mapping[str, Any]], replies: Sequence[Any], processing_class: ProcessingClass
) -> list[SafetySequence]:
    extras = ("tools", "chat_template_kwargs")
    rows = [
        {"prompt": row["prompt"], "completion": reply, **{key: row[key] for key in extras if row.get(key)}}
        for row, reply in zip(given, replies, strict=True)
    ]
    return read_safety_data(rows, processing_class, purpose="triples")


def _tokenised(given: Sequence[Mapping[str, Any]], processing_class: ProcessingClass) -> list[_Triple]:
    safe = _replies(given, [row["chosen"] for row in given], processing_class)
    harmful = _replies(given, [row["rejected"] for row in given], processing_class)
    triples = []
    for number, (one, other) in enumerate(zip(safe, harmful, strict=True)):
        prompt, reply = _split(one)
        same, bad = _split(other)
        if prompt != same:
            raise DataError(
                f"triples: row {number}: the prompt is tokenised in one way before the safe reply and in another "
                "before the harmful one; end it where a token ends, such as before a space"
            )
        closing = closing_length(other, processing_class)
        triples.append(
            _Triple(prompt=prompt, safe=reply, harmful=bad[: len(bad) - closing], closing=bad[len(bad) - closing :])
        )
    return triples


def _split(sequence: SafetySequence) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start = next(place for place, label in enumerate(sequence.labels) if label != IGNORED)
    return sequence.input_ids[:start], sequence.input_ids[start:]


def _first_token(given: Sequence[Mapping[str, Any]], refusal: str, processing_class: ProcessingClass) -> int:
    if not refusal.strip():
        raise ConfigurationError(f"derta_rows: refusal={refusal!r} has no words")
    replies = [in_place_of(row["chosen"], refusal) for row in given]
    tokenizer = required_tokenizer(processing_class)
    first = {_split(sequence)[1][0] for sequence in _replies(given, replies, processing_class)}
    if len(first) > 1:
        shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(first))
        raise ConfigurationError(
            f"derta_rows: refusal={refusal!r} begins with different tokens after different prompts ({shown}); give the "
            "prompts one form, all conversational or all plain with one ending"
        )
    (token,) = first
    if token in special_ids(tokenizer):
        raise ConfigurationError(
            f"derta_rows: refusal={refusal!r} begins with the special token "
            f"{tokenizer.convert_ids_to_tokens(token)!r}, which says nothing; give a refusal in words of the tokenizer"
        )
    return token
