"""The word-level tokenizer with its chat template, and conversations as labelled tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from safedelta_hf.errors import DataError
from safedelta_hf.testbed.language import vocabulary

IGNORED_LABEL: Final = -100
"""The label of tokens that carry no loss, by the convention of transformers."""

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "<|end|>"
ROLE_TOKENS: Final = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] }}{{ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of the language: one token per word.

    Returns:
        A tokenizer that pads on the left and has a chat template.
    """
    words = [PAD, UNKNOWN, BEGIN, END, *ROLE_TOKENS, *vocabulary()]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tokenize(
    conversations: Sequence[Mapping[str, Sequence[Mapping[str, str]]]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    """Turn conversations into labelled tokens for fine-tuning.

    Args:
        conversations: Conversations under "messages", each of which ends in an assistant turn.
        tokenizer: A tokenizer whose chat template lets a prompt be the beginning of the whole conversation.

    Returns:
        For each conversation its "input_ids" and "labels"; only the last answer and the token that ends it carry
        a label other than -100.

    Raises:
        DataError: If a conversation does not end in an assistant turn, or the template's prompt is not the
            beginning of the conversation.
    """
    rows: list[dict[str, list[int]]] = []
    for index, conversation in enumerate(conversations):
        messages = [dict(message) for message in conversation["messages"]]
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError(f"conversations[{index}]: the last message has to be the assistant's")
        prompt_ids = _render(messages[:-1], tokenizer, add_generation_prompt=True)
        input_ids = _render(messages, tokenizer, add_generation_prompt=False)
        if input_ids[: len(prompt_ids)] != prompt_ids:
            raise DataError(f"conversations[{index}]: its prompt is not the beginning of its tokens")
        labels = [IGNORED_LABEL] * len(prompt_ids) + input_ids[len(prompt_ids) :]
        rows.append({"input_ids": input_ids, "labels": labels})
    return rows


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> list[int]:
    encoding: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=True
    )
    return list(encoding["input_ids"])
