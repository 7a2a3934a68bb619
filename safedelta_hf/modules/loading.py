"""Language models from where users have them: a folder, the Hub, or an adapter that names its base."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from safedelta_hf.errors import ConfigurationError

_TOKENIZER_FILES: Final = ("tokenizer_config.json", "tokenizer.json")


class Source(NamedTuple):
    """What a name stands for.

    Attributes:
        base: Name or folder of a model.
        revision: Its revision on the Hub; None for the default one.
        adapter: Name or folder of the adapter on it; None if the name is that of the model.
    """

    base: str
    revision: str | None = None
    adapter: str | None = None


def source_of(name: str, option: str, base: str | None = None) -> Source:
    """Tell a model from an adapter.

    Args:
        name: Name or folder.
        option: What named it, for errors.
        base: Name or folder of the base, if it is an adapter; the one that it names if None.

    Returns:
        What it stands for.

    Raises:
        ConfigurationError: It is an adapter that does not say of which base, or is nothing that could be loaded.
    """
    with _named(f"{option} {name!r} cannot be loaded as a language model"):
        config = _found(name, "adapter_config.json")
        if config is None or Path(name, "config.json").is_file():
            return Source(name)
        if base is not None:
            return Source(base, None, name)
        settings: Any = json.loads(config.read_text(encoding="utf-8"))
        named, revision = settings["base_model_name_or_path"], settings.get("revision")
    if not isinstance(named, str) or not named or not isinstance(revision, str | None):
        raise ConfigurationError(
            f"{option} {name!r} is an adapter, and its adapter_config.json does not say of which base; enter the name "
            "or folder of that model there, as base_model_name_or_path"
        )
    return Source(named, revision, name)


def load_model(
    name: str, option: str, *, adapter: str | None = None, base: str | None = None, merged: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what an option names: a model, or an adapter with the base that it names.

    Args:
        name: Name or folder of a model, or of a PEFT adapter.
        option: The option, for errors.
        adapter: Name or folder of a PEFT adapter on it.
        base: As in `source_of`.
        merged: Whether an adapter is added to the weights, so that a plain model comes back.

    Returns:
        The model, of a class of PEFT if it has an adapter, and its tokenizer.

    Raises:
        ConfigurationError: One of them cannot be loaded.
    """
    source = source_of(name, option, base)
    model = load_base(source, f"{option} {name!r}", device_map="auto")
    if source.adapter is not None:
        model = with_adapter(model, source.adapter, f"{option} {name!r}", merged=merged)
    if adapter is not None:
        model = with_adapter(model, adapter, f"--adapter {adapter!r}", merged=merged)
    if merged and getattr(model, "peft_config", None):
        raise ConfigurationError(f"{option} {name!r} holds a model and an adapter; merge them (merge_and_unload) first")
    return model, load_tokenizer(source, f"{option} {name!r}")


def load_base(source: Source, what: str, **how: str) -> PreTrainedModel:
    """Load the model of a source, without the adapter.

    Args:
        source: The source.
        what: What to call it in errors.
        **how: Passed on to `from_pretrained`.

    Returns:
        The model.

    Raises:
        ConfigurationError: It cannot be loaded.
    """
    below = "" if source.adapter is None else f": its base {source.base!r}"
    with _named(f"{what}{below} cannot be loaded as a language model"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.base, revision=source.revision, **how)
    return model


def load_tokenizer(source: Source, what: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a source: the adapter's own if it has one, else that of its base.

    Args:
        source: The source.
        what: What to call it in errors.

    Returns:
        The tokenizer.

    Raises:
        ConfigurationError: It cannot be loaded.
    """
    with _named(f"{what} cannot be loaded as a language model: its tokenizer"):
        name, revision = source.base, source.revision
        if source.adapter is not None and any(_found(source.adapter, file) for file in _TOKENIZER_FILES):
            name, revision = source.adapter, None
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision)
    return tokenizer


def with_adapter(model: PreTrainedModel, adapter: str, what: str, *, merged: bool = False) -> PreTrainedModel:
    """Put a saved adapter on a model.

    Args:
        model: The model.
        adapter: Name or folder of a PEFT adapter.
        what: What to call it in errors.
        merged: Whether it is added to the weights, so that a plain model comes back.

    Returns:
        The model, of a class of PEFT unless the adapter was merged.

    Raises:
        ConfigurationError: It cannot be loaded on it.
    """
    with _named(f"{what} cannot be loaded on the model"):
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(model, adapter)
        loaded: PreTrainedModel = adapted.merge_and_unload() if merged else adapted
    return loaded


def _found(name: str, file: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name, file) if Path(name, file).is_file() else None
    path: str | None = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else Path(path)


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the libraries raise on what a folder holds
        raise ConfigurationError(f"{what} ({type(error).__name__}: {error})") from error
