"""Conversations through a chat template, and whether all that was said is still there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from safedelta_hf.data.forms import Turn, called, text_of
from safedelta_hf.errors import DataError, require_kind

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

_SHOWN = 240
"""Characters of a rendering that a message shows."""


def require_processing_class(owner: str, processing_class: object) -> None:
    """Stop at what turns nothing into tensors, such as the name of a tokenizer.

    Args:
        owner: What has the argument, for errors.
        processing_class: Of a caller.

    Raises:
        ConfigurationError: It is no tokenizer, processor or the like, nor None.
    """
    makes_tensors = callable(processing_class) or hasattr(processing_class, "tokenizer")
    if processing_class is not None and (isinstance(processing_class, type) or not makes_tensors):
        kinds = (PreTrainedTokenizerBase, ProcessorMixin)
        require_kind(owner, "processing_class", processing_class, kinds, "a tokenizer or a processor")


def tokenizer_of(processing_class: ProcessingClass | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of what a Trainer was given.

    Args:
        processing_class: Tokenizer, processor, or whatever else turns inputs into tensors; or None.

    Returns:
        It, or the tokenizer in it; None if there is none.
    """
    has_own = hasattr(processing_class, "get_vocab") or not hasattr(processing_class, "tokenizer")
    found: Any = processing_class if has_own else getattr(processing_class, "tokenizer", None)
    return found if hasattr(found, "get_vocab") else None


def template_of(processing_class: ProcessingClass | None) -> Any:  # noqa: ANN401 - text, or several by name
    """The chat template, which a processor may have where its tokenizer has none.

    Args:
        processing_class: Tokenizer or processor, or None.

    Returns:
        The template of the processor, else of the tokenizer; None if there is none.
    """
    own = getattr(processing_class, "chat_template", None)
    return own or getattr(tokenizer_of(processing_class), "chat_template", None)


@contextmanager
def refusing(place: str, what: str, advice: str) -> Iterator[None]:
    """Name the row on which a tokenizer or a chat template fails, whatever it raises.

    Args:
        place: The row.
        what: What fails.
        advice: What to do.

    Yields:
        Nothing.

    Raises:
        DataError: It failed, with its own message.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise DataError(f"{place}: {what} ({kind}{error}); {advice}") from error


def text_tokens(processing_class: ProcessingClass, text: str, place: str) -> list[int]:
    """Tokenise plain text, with the special tokens that the tokenizer adds.

    Args:
        processing_class: Tokenizer or processor.
        text: The text.
        place: Where it stands, for messages.

    Returns:
        Token ids.
    """
    tokenizer: Any = tokenizer_of(processing_class)
    with refusing(place, "the tokenizer does not take its text", "mend or drop it"):
        return list(tokenizer(text)["input_ids"])


def prompt_tokens(
    processing_class: ProcessingClass, chat: Sequence[Mapping[str, Any]], place: str = "a chat"
) -> list[int]:
    """Render a chat up to where the response begins.

    Args:
        processing_class: Tokenizer or processor with a chat template.
        chat: A chat that ends in a user turn.
        place: Where it stands, for messages.

    Returns:
        Token ids.
    """
    return conversation_tokens(processing_class, chat, None, {}, place)[0]


class Opening(NamedTuple):
    """What a chat template puts before what the assistant says.

    Attributes:
        tokens: What opens a response, such as the assistant's name; none where there is no such thing.
        added: Number of tokens that it puts after that and before a response that is given, such as an empty thought.
    """

    tokens: tuple[int, ...] = ()
    added: int = 0


def opening_of(processing_class: ProcessingClass | None) -> Opening:
    """Find out what a chat template puts before each response.

    Args:
        processing_class: Tokenizer or processor, or None.

    Returns:
        It; nothing where there is no chat template, or one that takes no chat of two turns.
    """
    if processing_class is None or not template_of(processing_class):
        return Opening()
    asked: Turn = {"role": "user", "content": "?"}
    try:
        with refusing("a chat", "the chat template rejects it", "set another chat template"):
            closed = _text(processing_class, [asked], options={})
            opened = _text(processing_class, [asked], opens_response=True, options={})
            answers = [{"role": "assistant", "content": text} for text in ("Yes", "no")]
            given = commonprefix([_text(processing_class, [asked, answer], options={}) for answer in answers])
    except DataError:
        return Opening()  # rows that it is to render say so themselves

    def tokens(longer: str, shorter: str) -> tuple[int, ...]:
        added = longer[len(shorter) :] if longer.startswith(shorter) else ""
        return tuple(_tokenizer(processing_class)(added, add_special_tokens=False)["input_ids"]) if added else ()

    return Opening(tokens(opened, closed), len(tokens(given, opened)))


def conversation_tokens(
    processing_class: ProcessingClass,
    prompt: Sequence[Mapping[str, Any]],
    response: Sequence[Mapping[str, Any]] | None,
    options: Mapping[str, Any],
    place: str,
) -> tuple[list[int], list[int]]:
    """Render a conversation, and its beginning up to where the response begins.

    Args:
        processing_class: Tokenizer or processor with a chat template.
        prompt: The turns before the response.
        response: The response, one turn or several, the last of them the assistant's; None for the beginning alone.
        options: What the template is given besides.
        place: Where it stands, for messages.

    Returns:
        Token ids of the beginning, and of the whole.

    Raises:
        DataError: The template rejects it, or leaves out what the user asks or what the response says.
    """
    # Contents are text, or, if the template fails or leaves words out so, lists of parts: templates of models for
    # images (LLaVA, Idefics) look for those, and given text render turns that are empty.
    failures: list[DataError] = []
    for shape in (_with_text, _with_parts):
        before, whole = [shape(turn) for turn in prompt], [shape(turn) for turn in (*prompt, *(response or ()))]
        try:
            with refusing(place, "the chat template rejects it", _advice(prompt)):
                opening = _text(processing_class, before, opens_response=True, options=options)
                text = opening if response is None else _text(processing_class, whole, options=options)
            _require_words(opening, text, prompt, response, place)
        except DataError as error:
            failures.append(error)
            continue
        with refusing(place, "the tokenizer does not take its text", "mend or drop it"):
            start = _tokens(processing_class, before, opening, opens_response=True, options=options)
            rest = start if response is None else _tokens(processing_class, whole, text, options=options)
        return start, rest
    # What a template says itself tells more than what goes wrong in it.
    failures.sort(key=lambda error: type(error.__cause__) is not TemplateError)
    raise failures[0]


def _with_text(turn: Mapping[str, Any]) -> Turn:
    return {**turn} if turn.get("content") is None else {**turn, "content": text_of(turn)}


def _with_parts(turn: Mapping[str, Any]) -> Turn:
    return {**turn, "content": [{"type": "text", "text": text_of(turn)}]}


def _advice(prompt: Sequence[Mapping[str, Any]]) -> str:
    if any(turn["role"] == "system" for turn in prompt):
        return "if it takes no system turn, put its text at the beginning of the user's first, or drop it"
    return "bring the turns into the order that it takes, or set another chat template"


def _text(
    processing_class: ProcessingClass,
    turns: Sequence[Turn],
    *,
    opens_response: bool = False,
    options: Mapping[str, Any],
) -> str:
    return str(
        _templated(processing_class).apply_chat_template(
            turns, tokenize=False, add_generation_prompt=opens_response, **options
        )
    )


def _templated(processing_class: ProcessingClass) -> Any:  # noqa: ANN401 - a tokenizer or a processor
    has_own = getattr(processing_class, "chat_template", None)
    return processing_class if has_own else tokenizer_of(processing_class)


def _tokenizer(processing_class: ProcessingClass) -> Any:  # noqa: ANN401 - calls of it are not typed
    return tokenizer_of(processing_class)


def _tokens(
    processing_class: ProcessingClass,
    turns: Sequence[Turn],
    text: str,
    *,
    opens_response: bool = False,
    options: Mapping[str, Any],
) -> list[int]:
    owner, tokenizer = _templated(processing_class), _tokenizer(processing_class)
    if owner is tokenizer:
        encoded = owner.apply_chat_template(
            turns, tokenize=True, return_dict=True, add_generation_prompt=opens_response, **options
        )
        return list(encoded["input_ids"])
    # As a processor does with text alone, without asking it for images.
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins)["input_ids"])


def _require_words(
    opening: str,
    whole: str,
    prompt: Sequence[Mapping[str, Any]],
    response: Sequence[Mapping[str, Any]] | None,
    place: str,
) -> None:
    start = len(commonprefix([opening, whole]))
    asked = prompt[-1] if prompt and prompt[-1]["role"] == "user" else None
    if asked is not None and not _shows(whole[:start], asked):
        if _shows(opening, asked) and _shows(whole, asked):
            raise DataError(
                f"{place}: the chat template renders the prompt otherwise alone than with the response; they part "
                f"before the end of the prompt, at {_shortened(whole[start:])}. Set a template that renders them alike"
            )
        raise _missing("what the user says", whole, place)
    if response is None:
        return
    # What the response begins with may stand in the opening already, such as a tag for thoughts.
    after = whole[max(0, start - len(_last_line(response[-1]))) :]
    if not _shows(after, response[-1]):
        raise _missing("the response", whole, place)


def _missing(what: str, rendering: str, place: str) -> DataError:
    return DataError(
        f"{place}: the chat template leaves out {what}; it renders {_shortened(rendering)}. Set a chat_template that "
        "shows every turn, or give 'prompt' and 'completion' as plain text"
    )


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}")


def _shows(rendering: str, turn: Mapping[str, Any]) -> bool:
    # By its last line, since templates strip space, and some of them thoughts; escapes leave letters and digits alone.
    said = _last_line(turn)
    if said.strip() in rendering:
        return True
    counts: Callable[[str], bool] = str.isalnum if any(map(str.isalnum, said)) else str.isprintable
    wanted, found = ("".join(filter(counts, text)).replace(" ", "").casefold() for text in (said, rendering))
    return wanted in found


def _last_line(turn: Mapping[str, Any]) -> str:
    text = text_of(turn)
    if not text.strip():
        text = called(turn)
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
