"""Responses by real generation, greedy decoding of chats through ``model.generate``, and what they depend on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from safedelta_hf.data.batches import require_fit
from safedelta_hf.data.dataset import tokenizer_digest
from safedelta_hf.data.templates import ProcessingClass, prompt_tokens, template_of, tokenizer_of
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.modules.adapters import active_adapters
from safedelta_hf.modules.evaluating import evaluating
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.weights.digest import digest

Chat = Sequence[Mapping[str, Any]]


def generate_responses(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    conversations: Sequence[Chat],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    known: Mapping[int, str] | None = None,
    on_batch: Callable[[dict[int, str]], None] | None = None,
    progress: bool = False,
    desc: str = "Generating",
) -> list[str]:
    """Let a model answer chats, by greedy decoding.

    Chats are batched by length, padded on the left, and the responses come back in the order of the chats. The
    model's mode and cache setting and the tokenizer's padding side are as before afterwards, also after an error.

    Batches are made of all chats, and those with responses that are not known are generated whole. So a run that goes
    on with the responses of an earlier one meets the same padding, and the same rounding, as if it had never stopped.

    Args:
        model: A causal language model, on any device.
        processing_class: Its tokenizer, or its processor, with a chat template and a padding token.
        conversations: Chats that end in a user turn; each is a sequence of messages with "role" and "content".
        max_new_tokens: Length limit of a response, in tokens.
        batch_size: Chats per call of ``model.generate``.
        known: Responses that are there already, by index of the chat.
        on_batch: Given the new responses of each batch, by index of the chat, as soon as they are made.
        progress: Whether to show a progress bar.
        desc: What the progress bar says.

    Returns:
        One response per chat, without special tokens and surrounding space.

    Raises:
        ConfigurationError: If a limit is below 1, or the tokenizer lacks a chat template or a padding token.
        DataError: If a chat is empty, does not end in a user turn, is rejected by the chat template, or is longer
            than the model takes.
    """
    tokenizer = _checked(processing_class, max_new_tokens=max_new_tokens, batch_size=batch_size)
    _check_chats(conversations)
    prompts = [
        prompt_tokens(processing_class, chat, f"conversations[{index}]") for index, chat in enumerate(conversations)
    ]
    require_fit(model, prompts, "conversations")
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    responses = dict(known or {})
    batches = [batch for batch in batches if not responses.keys() >= set(batch)]
    with _generating(model, tokenizer):
        for batch in progress_bar(batches, desc=desc, unit="batch", disable=not progress):
            answers = _answer_batch(model, tokenizer, [prompts[index] for index in batch], max_new_tokens)
            new = {index: text for index, text in zip(batch, answers, strict=True) if index not in responses}
            responses.update(new)
            if on_batch is not None:
                on_batch(new)
    return [responses[index] for index in range(len(prompts))]


def _checked(processing_class: ProcessingClass, **counts: int) -> PreTrainedTokenizerBase:
    for name, value in counts.items():
        if value < 1:
            raise ConfigurationError(f"{name}: must be at least 1, got {value}")
    tokenizer = tokenizer_of(processing_class)
    if tokenizer is None or not template_of(processing_class):
        raise ConfigurationError("processing_class: the tokenizer needs a chat template, and has none")
    if tokenizer.pad_token_id is None:
        raise ConfigurationError("processing_class: the tokenizer needs a padding token; set its pad_token")
    return tokenizer


def _check_chats(conversations: Sequence[Chat]) -> None:
    for index, chat in enumerate(conversations):
        if not chat or chat[-1].get("role") != "user":
            raise DataError(f"conversations[{index}]: a chat to be answered has to end in a user turn")


def _answer_batch(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> list[str]:
    batch = processing_class.pad({"input_ids": prompts}, padding=True, return_tensors="pt").to(model.device)
    generate: Any = model.generate
    tokens = generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens
    )
    new_tokens = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processing_class.batch_decode(new_tokens, skip_special_tokens=True)]


def _end_tokens(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> list[int]:
    # Chat models often stop at a token of their own beside the tokenizer's end of text, and only one of the two
    # names it: the generation settings or the tokenizer.
    named = getattr(model.generation_config, "eos_token_id", None)
    own = named if isinstance(named, list) else [named]
    return sorted({token for token in (*own, processing_class.eos_token_id) if token is not None})


@contextmanager
def _generating(model: PreTrainedModel, processing_class: PreTrainedTokenizerBase) -> Iterator[None]:
    use_cache = getattr(model.config, "use_cache", None)
    padding_side = processing_class.padding_side
    # `generate` fills what a call leaves open from the model's own settings (penalties, beams), so those stand aside.
    greedy: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        use_cache=True,
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=_end_tokens(model, processing_class),
    )
    settings = _generation_settings(model)
    if use_cache is not None:
        model.config.use_cache = True
    processing_class.padding_side = "left"
    try:
        for module in settings:
            module.generation_config = greedy
        with evaluating(model):
            yield
    finally:
        for module, own in settings.items():
            module.generation_config = own
        if use_cache is not None:
            model.config.use_cache = use_cache
        processing_class.padding_side = padding_side


def _generation_settings(model: nn.Module) -> dict[nn.Module, Any]:
    # An adapter model writes its own settings into the model that it wraps, so both are put back.
    return {
        module: vars(module)["generation_config"] for module in model.modules() if "generation_config" in vars(module)
    }


_INCIDENTAL: Final = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
"""Parts of a configuration that do not change what the model says, or, like the data type, that its weights tell."""


def model_digest(model: nn.Module, processing_class: ProcessingClass | None) -> str:
    """Digest of weights, buffers, adapters, configuration and tokenizer.

    Args:
        model: The model, with or without adapters.
        processing_class: Its tokenizer or processor, if there is one.

    Returns:
        A hexadecimal SHA-256 digest.

    Raises:
        ConfigurationError: Some weights are offloaded to where they cannot be read.
    """
    offloaded = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if offloaded:
        raise ConfigurationError(
            f"{offloaded[0]} and {len(offloaded) - 1} other weights are offloaded, so the model cannot be told from "
            "others; use devices or memory that hold it whole"
        )
    state = {name: digest(tensor) for name, tensor in sorted(model.state_dict().items())}
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    content = {
        "state": state,
        "config": {key: value for key, value in described.items() if key not in _INCIDENTAL},
        "adapters": {name: _scaling(adapter) for name, adapter in adapters.items()},
        "active": active_adapters(model) if adapters else None,
        "tokenizer": tokenizer_digest(processing_class),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _scaling(adapter: dict[str, Any]) -> dict[str, Any]:
    # Where an adapter came from, and whether it is to be trained, is no part of what it does.
    incidental = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"}
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in adapter.items()
        if key not in incidental
    }
