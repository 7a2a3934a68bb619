"""The forms that rows come in, and the few that they are read in."""

import itertools
import json
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any, Final

from safedelta_hf.errors import DataError

IGNORED = -100
"""Label of a token that is not part of the response."""

FORMS: Final = "'messages', 'prompt' + 'completion', 'text', or 'input_ids' (+ 'labels')"

ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""From what ShareGPT's `from` says to the role that chat templates know."""

_TOKENS: Final = (
    "input_ids",
    "labels",
    "attention_mask",
    "completion_mask",
    "assistant_masks",
    "prompt_ids",
    "completion_ids",
    "chosen_ids",
    "rejected_ids",
    "chosen_input_ids",
    "chosen_labels",
)
_OTHER_MEDIA: Final = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
_OPTIONS: Final = ("tools", "chat_template_kwargs")

Turn = dict[str, Any]
"""One message of a conversation, with "role" and "content"."""


def is_tokenised(row: Any) -> bool:  # noqa: ANN401 - whatever a source holds
    """Whether a row holds tokens.

    Args:
        row: The row.

    Returns:
        Whether it does, under a name that TRL's trainers use.
    """
    return isinstance(row, Mapping) and not row.keys().isdisjoint(_TOKENS)


def in_known_form(row: Any, place: str) -> dict[str, Any] | None:  # noqa: ANN401 - whatever a source holds
    """Bring a row into one of the forms that are tokenised.

    Args:
        row: A row in any form of TRL's, as its users write it or as its trainers keep it; ShareGPT's
            (`conversations`), or Alpaca's (`instruction`, `input`, `output`). Of preferences the chosen response is
            the response.
        place: Where the row stands, for messages.

    Returns:
        The row with `input_ids` (+ `labels`, `attention_mask`), `messages`, `prompt` + `completion` or `text`, and with
        what its chat template is to be given; None for a response that is marked as undesirable, as for KTO.

    Raises:
        DataError: The row has no known form, no response, or more than text.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place} is a {type(row).__name__}, not a dict with {FORMS}")
    given = {key: value for key, value in row.items() if value is not None}
    media = [key for key in _OTHER_MEDIA if key in given and (not hasattr(given[key], "__len__") or len(given[key]))]
    if media:
        raise DataError(f"{place} holds {media[0]!r}, and text alone is read; give rows without it, text alone")
    found = _tokens(given, place) or _conversation(given, place) or _completed(given)
    if found is None:
        raise DataError(_formless(given, place))
    if _is_undesirable(given):
        return None
    return found | {key: given[key] for key in _OPTIONS if key in given}


def _tokens(row: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    ids = {name: _numbers(row[name], name, place) for name in _TOKENS if name in row}
    if "input_ids" in ids:
        masks = [ids[name] for name in ("completion_mask", "assistant_masks") if name in ids]
        seen = zip(ids["input_ids"], *masks, strict=False)
        labels = ids["labels"] if "labels" in ids else [token if all(bits) else IGNORED for token, *bits in seen]
        return _sequence(ids["input_ids"], labels, ids.get("attention_mask"), place)
    if "chosen_input_ids" in ids and "chosen_labels" in ids:  # ORPO, CPO
        return _sequence(ids["chosen_input_ids"], ids["chosen_labels"], None, place)
    response = ids.get("chosen_ids", ids.get("completion_ids"))
    if response is None:
        return None
    if "prompt_ids" in ids:  # DPO, KTO, TPO
        prompt = ids["prompt_ids"]
        return _sequence(prompt + response, [IGNORED] * len(prompt) + response, None, place)
    start = _shared(response, ids.get("rejected_ids", []))  # reward models
    return _sequence(response, [IGNORED] * start + response[start:], None, place)


def _sequence(tokens: list[int], labels: list[int], mask: list[int] | None, place: str) -> dict[str, Any]:
    attended = [1] * len(tokens) if mask is None else mask
    if not len(labels) == len(tokens) == len(attended):
        raise DataError(
            f"{place} has {len(tokens)} input_ids but {len(labels)} labels and {len(attended)} attention_mask"
        )
    wrong = next((token for token in tokens if token < 0), None)
    wrong = next((label for label in labels if label < 0 and label != IGNORED), wrong)
    if wrong is not None:
        raise DataError(f"{place}: {wrong} is no token, and no label that is left out ({IGNORED})")
    return {"input_ids": tokens, "labels": labels} | ({} if mask is None else {"attention_mask": mask})


def _numbers(value: Any, name: str, place: str) -> list[int]:  # noqa: ANN401 - whatever a source holds
    entries = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes):
        raise DataError(f"{place}: {name} is a {type(value).__name__}, not a list of whole numbers")
    found = [entry.item() if hasattr(entry, "item") and getattr(entry, "ndim", 1) == 0 else entry for entry in entries]
    wrong = [type(entry) for entry in found if not isinstance(entry, int)]
    if wrong:
        nested = "; a row is one sequence, without a dimension for a batch" if issubclass(wrong[0], Sequence) else ""
        raise DataError(f"{place}: {name} holds a {wrong[0].__name__} instead of a whole number{nested}")
    return list(map(int, found))


def _conversation(row: Mapping[str, Any], place: str) -> dict[str, Any] | None:
    turns = turns_of_row(row, place)
    if turns is None and "chosen" in row and not isinstance(row["chosen"], str) and isinstance(row.get("prompt"), str):
        turns = turns_of(row["chosen"], place, "'chosen'")  # the whole conversation, with its prompt beside it as text
    return None if turns is None else {"messages": turns}


def _completed(row: Mapping[str, Any]) -> dict[str, Any] | None:
    response = row.get("completion", row.get("chosen"))
    if "prompt" in row and response is not None:
        return {"prompt": row["prompt"], "completion": response}
    if "chosen" not in row:
        return {"text": row["text"]} if "text" in row else None
    rejected = row.get("rejected", response[:0] if isinstance(response, str | list) else None)
    if isinstance(response, str) and isinstance(rejected, str):
        start = len(commonprefix([response, rejected]))
        return {"prompt": response[:start], "completion": response[start:]}
    if isinstance(response, list) and isinstance(rejected, list):
        # The last turn is no prompt, whatever the other response begins with.
        start = min(_shared(response, rejected), max(len(response) - 1, 0))
        return {"prompt": response[:start], "completion": response[start:]} if start else {"messages": response}
    return {"messages": response}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    # In how many entries two sequences begin alike.
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_undesirable(row: Mapping[str, Any]) -> bool:
    # Of KTO; a label that is no truth value is something else.
    label = row.get("label")
    says = isinstance(label, str) or type(label).__name__ in ("bool", "bool_")
    return says and str(label).lower() == "false" and not {"completion", "completion_ids"}.isdisjoint(row)


def _formless(row: Mapping[str, Any], place: str) -> str:
    prompts = [name for name in ("prompt", "prompt_ids", "prompt_input_ids") if name in row]
    if prompts:
        return (
            f"{place} has a prompt and no response, as rows of GRPO, RLOO or Online DPO; give prompts together with "
            "responses to them, such as good answers of the model that is trained"
        )
    return f"{place} has the keys {sorted(map(str, row))}; expected {FORMS}"


def turns_of_row(row: Mapping[str, Any], place: str) -> list[Turn] | None:
    """The conversation in a row that holds one as a whole.

    Args:
        row: The row, with `messages`, `conversations` (ShareGPT), or `instruction` (Alpaca); `system` beside any of
            them, and Alpaca's `history`, as in LLaMA-Factory's data sets.
        place: Where the row stands, for messages.

    Returns:
        Its turns; None for a row of another form.

    Raises:
        DataError: It holds something else there.
    """
    name = next((name for name in ("messages", "conversations", "instruction") if row.get(name) is not None), None)
    if name is None:
        return None
    turns = _alpaca(row, place) if name == "instruction" else turns_of(row[name], place, repr(name))
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system):
        return turns
    if not isinstance(system, str):
        raise DataError(f"{place}: 'system' has to be text")
    if turns and turns[0]["role"] == "system":
        raise DataError(f"{place} has a system prompt twice, under 'system' and as the first of its {name!r}")
    return [{"role": "system", "content": system}, *turns]


def _alpaca(row: Mapping[str, Any], place: str) -> list[Turn]:
    asked = [part for part in (row["instruction"], row.get("input")) if part not in (None, "")]
    said = [row["output"]] if row.get("output") is not None else []
    before = _said_before(row.get("history"), place)
    if not all(isinstance(part, str) for part in (*before, *asked, *said)):
        raise DataError(f"{place}: 'instruction', 'input', 'output' and 'history' have to be text")
    texts = [*before, "\n\n".join(asked), *said]
    return [
        {"role": role, "content": text}
        for role, text in zip(itertools.cycle(("user", "assistant")), texts, strict=False)
    ]


def _said_before(history: Any, place: str) -> list[Any]:  # noqa: ANN401 - whatever a source holds
    history = history.tolist() if hasattr(history, "tolist") else history or []
    pairs = [history, *history] if isinstance(history, list | tuple) else [history]
    if not all(isinstance(pair, list | tuple) for pair in pairs) or any(len(pair) != 2 for pair in history):
        raise DataError(f"{place}: 'history' has to be a list of pairs, of what was asked and what was answered")
    return [text for pair in history for text in pair]


def turns_of(value: Any, place: str, what: str) -> list[Turn]:  # noqa: ANN401 - whatever a source holds
    """Read a conversation.

    Args:
        value: What stands where turns should: messages with "role" and "content", or, as in ShareGPT's, "from" and
            "value".
        place: Where, for messages.
        what: Under which key.

    Returns:
        The turns, with "role" and "content".

    Raises:
        DataError: It is something else, or holds more than text.
    """
    complaint = f"{place}: a chat is a list of messages, each with 'role' and 'content'; {what}"
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{complaint} is a {type(value).__name__}")
    return [_turn(turn, f"{complaint} holds, as number {number},") for number, turn in enumerate(value)]


def _turn(turn: Any, complaint: str) -> Turn:  # noqa: ANN401
    if not isinstance(turn, Mapping):
        raise DataError(f"{complaint} a {type(turn).__name__}")
    found = {str(key): value for key, value in turn.items() if value is not None or key == "content"}
    if "role" not in found and "from" in found:
        if found["from"] not in ROLES:
            raise DataError(f"{complaint} one from {found['from']!r}, which is none of {', '.join(ROLES)}")
        found["role"] = ROLES[found.pop("from")]
        found["content"] = found.pop("value", None)
    if not isinstance(found.get("role"), str):
        raise DataError(f"{complaint} one with the role {found.get('role')!r}")
    calls = found.get("tool_calls") or []
    if not isinstance(calls, list | tuple) or not all(
        isinstance(call, Mapping) and isinstance(call.get("function", call), Mapping) for call in calls
    ):
        raise DataError(f"{complaint} one whose tool_calls are no list of calls")
    if found.get("content") is None:
        if not calls:
            raise DataError(f"{complaint} one without content")
    elif not isinstance(found["content"], str):
        found["content"] = [_part(part, complaint) for part in _parts(found["content"], complaint)]
    return found


def _parts(content: Any, complaint: str) -> Sequence[Any]:  # noqa: ANN401
    content = content.tolist() if hasattr(content, "tolist") else content
    if not isinstance(content, list | tuple):
        raise DataError(f"{complaint} one whose content is a {type(content).__name__}")
    return content


def _part(part: Any, complaint: str) -> dict[str, str]:  # noqa: ANN401
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text", part.get("content"))
        if isinstance(text, str):
            return {"type": "text", "text": text}
    kind = part.get("type", "without a type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(
        f"{complaint} one with a part that is no text ({kind}), and text alone is read; leave such rows out"
    )


def text_of(turn: Mapping[str, Any]) -> str:
    """What is said in a turn.

    Args:
        turn: A turn, whose content is text, a list of parts, or nothing.

    Returns:
        The text of all parts.
    """
    content = turn.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def called(turn: Mapping[str, Any]) -> str:
    """The last tool that is called in a turn.

    Args:
        turn: A turn.

    Returns:
        The name of its function; empty if none is called.
    """
    calls = turn.get("tool_calls") or [{}]
    return str(calls[-1].get("function", calls[-1]).get("name", ""))


def answered(turns: Sequence[Turn]) -> bool:
    """Whether a conversation ends in something that the assistant says or does.

    Args:
        turns: The conversation.

    Returns:
        Whether its last turn is the assistant's, and not blank.
    """
    if not turns or turns[-1]["role"] != "assistant":
        return False
    return bool(text_of(turns[-1]).strip() or called(turns[-1]))


def tools_of(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What a chat template is given besides the turns.

    Args:
        row: A row, perhaps with `tools` (also as JSON text) and `chat_template_kwargs`, as in TRL.
        place: Where the row stands, for messages.

    Returns:
        Keyword arguments.

    Raises:
        DataError: They are something else.
    """
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: 'tools' is text that is not JSON ({error})") from error
    if not isinstance(options, Mapping) or not isinstance(tools, list | tuple | None):
        raise DataError(f"{place}: 'tools' has to be a list, and 'chat_template_kwargs' a dict")
    return {"tools": tools or None, **options}
