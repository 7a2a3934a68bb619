"""Rows of token ids with labels of their own, as TRL's SFTTrainer and the plain Trainer take them."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from transformers import PreTrainedTokenizerBase, TrainingArguments

from safedelta_hf.data.dataset import SafetySequence, Source
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.rows import read_rows
from safedelta_hf.data.templates import ProcessingClass, tokenizer_of
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.rules.rule import require_number

if TYPE_CHECKING:
    from datasets import Dataset

"""A `datasets.Dataset`, any iterable of dicts, a file, or the name of a data set on the Hub, as `read_rows` takes."""

OVER_REFUSAL: Final = (
    "measure over-refusal on prompts that only look harmful: `safedelta eval --benign FILE`, the score over_refusal"
)


def rows_of(source: Source, purpose: str) -> list[Mapping[str, Any]]:
    """Read rows, whatever they hold.

    Args:
        source: Where they are.
        purpose: What errors call them.

    Returns:
        The rows.

    Raises:
        DataError: There is no such source, or a row is no dict.
    """
    try:
        placed = read_rows(source)
    except DataError as error:
        raise error.at(purpose) from error
    for place, row in placed:
        if not isinstance(row, Mapping):
            raise DataError(f"{purpose}: {place} is a {type(row).__name__}, not a dict with columns")
    return [row for _, row in placed]


def to_dataset(sequences: Sequence[SafetySequence]) -> "Dataset":
    """Make rows of sequences.

    Args:
        sequences: Token ids, each with the label that its position is to be trained on.

    Returns:
        A Dataset with the columns `input_ids`, `attention_mask` (all ones) and `labels`, in the given order.

    Raises:
        ConfigurationError: The package datasets is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ConfigurationError(f"rows for training need the package datasets ({error}); pip install datasets") from (
            error
        )
    return Dataset.from_dict(
        {
            "input_ids": [list(sequence.input_ids) for sequence in sequences],
            "attention_mask": [[1] * len(sequence.input_ids) for sequence in sequences],
            "labels": [list(sequence.labels) for sequence in sequences],
        }
    )


def check_arguments(args: TrainingArguments, rows: Iterable[Mapping[str, Any]]) -> None:
    """Make sure that a Trainer will train on rows as they were made.

    Args:
        args: Arguments of the Trainer; of TRL's SFTTrainer an `SFTConfig`.
        rows: Rows with `input_ids` and `labels`.

    Raises:
        ConfigurationError: Rows would be packed, or cut.
    """
    if getattr(args, "packing", False):
        raise ConfigurationError(
            "packing=True lays several rows end to end, but the labels of these rows hold after their own prompt "
            "alone; set packing=False"
        )
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    limit = getattr(args, "max_length", None)
    if limit is not None and longest > limit:
        raise ConfigurationError(
            f"max_length={limit} would cut rows of up to {longest} tokens, and labels with them; make the rows with "
            f"max_length={limit}, or raise it"
        )


def closing_length(sequence: SafetySequence, processing_class: ProcessingClass) -> int:
    """Count the tokens that end a response: the end of the turn, and what a chat template puts after it.

    Args:
        sequence: A sequence that ends with its response.
        processing_class: Its tokenizer or processor.

    Returns:
        Length of the longest end of the response that is special tokens and white space, and begins with a special
        token; 0 without one.
    """
    tokenizer = required_tokenizer(processing_class)
    special = special_ids(tokenizer)
    closing = 0
    for length, (token, label) in enumerate(
        zip(reversed(sequence.input_ids), reversed(sequence.labels), strict=True), start=1
    ):
        if label == IGNORED or not (token in special or _is_space(tokenizer, token)):
            break
        closing = length if token in special else closing
    return closing


def _is_space(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return not str(tokenizer.decode([token])).strip()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Find the tokens that stand for no text.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Ids of all special tokens, also of those that have no name of their own, such as the end of a turn.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}


def in_place_of(reply: str | Sequence[Mapping[str, Any]], text: str) -> str | list[dict[str, str]]:
    """Put another text where a reply stands.

    Args:
        reply: A completion: a string, or messages.
        text: The text.

    Returns:
        The text in the form of the reply, after the white space that the reply begins with.
    """
    if isinstance(reply, str):
        return reply[: len(reply) - len(reply.lstrip())] + text
    return [{"role": "assistant", "content": text}]


def required_tokenizer(processing_class: ProcessingClass | None) -> PreTrainedTokenizerBase:
    """Find the tokenizer, where nothing can be done without one.

    Args:
        processing_class: A tokenizer, or a processor that has one.

    Returns:
        The tokenizer.

    Raises:
        ConfigurationError: There is none.
    """
    found = tokenizer_of(processing_class)
    if found is None:
        raise ConfigurationError("processing_class=None: these rows are made of tokens; pass the model's tokenizer")
    return found


def drawn(count: int, available: int, seed: int, *, what: str, repeat: bool = False) -> list[int]:
    """Draw places at random, without repetition unless there are too few.

    Args:
        count: How many.
        available: From how many.
        seed: Of the draw.
        what: What they are, for errors.
        repeat: Whether they may be drawn again once all of them are.

    Returns:
        Places; each occurs as often as any other, or once more.

    Raises:
        DataError: There are too few.
    """
    if count > available and not (repeat and available):
        raise DataError(f"{what}: {count} are needed and {available} are there; give more, or ask for a smaller share")
    generator = random.Random(f"draw {what} {seed}")
    rounds, rest = divmod(count, available) if available else (0, 0)
    return [*(list(range(available)) * rounds), *generator.sample(range(available), rest)]


def count_of_share(share: float, others: int) -> int:
    """How many rows make up a share of a mixture.

    Args:
        share: Of all rows of the mixture, in [0, 1).
        others: Number of the other rows.

    Returns:
        The number whose share is nearest.
    """
    return round(share / (1 - share) * others)


def require_share(owner: str, field: str, value: object) -> None:
    """Stop at a share of a mixture that is none.

    Args:
        owner: The function.
        field: Its argument.
        value: What was given.
    """
    require_number(owner, field, value, "of at least 0 and below 1", lambda share: 0 <= share < 1)
