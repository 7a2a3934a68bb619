"""Rows to train a small guard of one's own on: verdict, category and reply after special tokens (arXiv 2405.19795)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.guard import FORMATS, GUARD_TOKENS, Text, shown_to_guard
from safedelta_hf.training.rows import to_dataset

if TYPE_CHECKING:
    from datasets import Dataset


def add_guard_tokens(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> None:
    """Give a model and its tokenizer the special tokens of a guard, in place.

    A LoRA has to train their embeddings: pass their ids to PEFT as `trainable_token_indices`, or the embedding and the
    head as `modules_to_save`.

    Args:
        model: The model; its embeddings grow if they have to.
        processing_class: Its tokenizer.
    """
    processing_class.add_special_tokens({"additional_special_tokens": list(GUARD_TOKENS)})
    embedding: Any = model.get_input_embeddings()
    if len(processing_class) > embedding.num_embeddings:
        model.resize_token_embeddings(len(processing_class))


def guard_rows(
    texts: Sequence[Text],
    unsafe: Sequence[bool],
    processing_class: PreTrainedTokenizerBase,
    *,
    categories: Sequence[str | None] | None = None,
    replies: Sequence[str | None] | None = None,
    max_length: int | None = None,
) -> "Dataset":
    """Make the rows that teach a small model to be a guard.

    A row is the text, `<|guard|>`, then `<|unsafe|>` or `<|safe|>`, and where they are given `<|category|>` with the
    kind of harm and `<|reply|>` with the safe reply; the loss is on all after `<|guard|>`. The paper learns detection,
    rationale and reply together too; its tokens are not published, and these are our own.

    Args:
        texts: Prompts, or pairs of a prompt and a response.
        unsafe: Whether each is unsafe.
        processing_class: The guard's tokenizer, after `add_guard_tokens`.
        categories: The kind of harm of each, or None.
        replies: What to answer to each, or None.
        max_length: Longest row in tokens; the end is cut, never the verdict.

    Returns:
        One row for each text, with `input_ids`, `attention_mask` and `labels`.

    Raises:
        ConfigurationError: The tokenizer does not have the tokens.
        DataError: The lists differ in length, or a text and its verdict do not fit into `max_length`.
    """
    known = processing_class.get_vocab()
    if missing := [token for token in GUARD_TOKENS if token not in known]:
        raise ConfigurationError(f"guard_rows: the tokenizer has no token {missing[0]!r}; call add_guard_tokens first")
    extras = [list(each) if each is not None else [None] * len(texts) for each in (categories, replies)]
    if not len(texts) == len(unsafe) == len(extras[0]) == len(extras[1]):
        raise DataError(
            f"guard_rows: there are {len(texts)} texts, {len(unsafe)} verdicts, {len(extras[0])} categories and "
            f"{len(extras[1])} replies; one of each is needed"
        )
    rows = []
    for number, (text, is_unsafe, category, reply) in enumerate(zip(texts, unsafe, *extras, strict=True)):
        before = list(processing_class(shown_to_guard(FORMATS["own"], text))["input_ids"])
        if max_length is not None and len(before) >= max_length:
            raise DataError(
                f"guard_rows: text {number} has {len(before)} tokens, and max_length={max_length} leaves no room for "
                "its verdict; raise it, or shorten the text"
            )
        after = _answer(is_unsafe, category, reply, processing_class)
        rows.append(
            SafetySequence(
                input_ids=tuple((before + after)[:max_length]),
                labels=tuple(([IGNORED] * len(before) + after)[:max_length]),
            )
        )
    return to_dataset(rows)


def _answer(
    is_unsafe: bool, category: str | None, reply: str | None, processing_class: PreTrainedTokenizerBase
) -> list[int]:
    text = "<|unsafe|>" if is_unsafe else "<|safe|>"
    text += "" if category is None else f"<|category|>{category}"
    text += "" if reply is None else f"<|reply|>{reply}"
    tokens = list(processing_class(text, add_special_tokens=False)["input_ids"])
    return tokens if processing_class.eos_token_id is None else [*tokens, processing_class.eos_token_id]
