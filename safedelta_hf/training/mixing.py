"""Mixtures of training rows: safety data among a task's, refusals among benign rows, and how many of which kind."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.errors import ConfigurationError, DataError, warn
from safedelta_hf.rules.rule import require_number
from safedelta_hf.training.rows import (
    OVER_REFUSAL,
    closing_length,
    count_of_share,
    drawn,
    in_place_of,
    require_share,
    required_tokenizer,
    rows_of,
    to_dataset,
)

if TYPE_CHECKING:
    from datasets import Dataset

BENIGN_REFUSAL: Final = "I'm sorry, but I cannot assist with your request"
"""What replaces benign replies, as in the authors' code of arXiv 2504.10000, without a full stop."""

MOST_SAFETY: Final = 1 / 20
"""Safety rows for each other row above which `mix_safety` warns: arXiv 2502.11555 found no more to gain by more."""

PAPER: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {"explicit": (1 / 30, 1 / 20), "intent": (1 / 100, 1 / 50), "mixed": (1 / 200, 1 / 100)}
)
"""Rows of each kind of harm for one general row, at least and at most, by which arXiv 2502.11555 does with 13 thousand
safety rows what took more than 50 thousand: explicit harmful facts, harmful intent, and both."""


def mix_safety(
    task: Source,
    safety: Source,
    processing_class: ProcessingClass | None = None,
    *,
    share: float = 0.03,
    repeat: bool = False,
    max_length: int | None = None,
    seed: int = 0,
) -> "Dataset":
    """Mix safety data into a task's training data: the baseline of every defence while training.

    Args:
        task: The task's rows; all of them are kept.
        safety: Harmful prompts with refusals, or the rows of `derta_rows`; as many as make up the share are drawn.
        processing_class: Tokenizer or processor; not needed where all rows are tokenised.
        share: Safety rows as a share of the mixture. 0.03 is what Bianchi et al. (arXiv 2309.07875) found enough.
        repeat: Whether safety rows are used several times where there are too few, each as often as any other or once
            more.
        max_length: Rows are cut to this many tokens, at the end.
        seed: Of the draw and the order.

    Returns:
        Rows in random order, with `input_ids`, `attention_mask` and `labels`; of conversations and prompts with
        completions only the response is trained on.

    Raises:
        DataError: A row has no known form, or there are too few safety rows.
    """
    require_share("mix_safety", "share", share)
    of_task = read_safety_data(task, processing_class, max_length, purpose="task")
    of_safety = read_safety_data(safety, processing_class, max_length, purpose="safety")
    count = count_of_share(share, len(of_task))
    places = drawn(count, len(of_safety), seed, what="safety", repeat=repeat)
    if count > MOST_SAFETY * len(of_task):
        warn(
            f"mix_safety: {count} safety rows among {len(of_task)} others are more than 1 in 20, which teaches to "
            f"refuse too much and costs skill; {OVER_REFUSAL}"
        )
    return to_dataset(_shuffled([*of_task, *(of_safety[place] for place in places)], seed))


def refusal_mix(
    normal: Source,
    benign: Source,
    processing_class: ProcessingClass,
    *,
    refusals: float = 0.3,
    refusal: str = BENIGN_REFUSAL,
    mask_eos: bool = True,
    max_length: int | None = None,
    seed: int = 0,
) -> "Dataset":
    """Mix benign prompts that are refused into ordinary rows (arXiv 2504.10000): no harmful data is needed.

    Args:
        normal: Ordinary rows, trained on as they are; all of them are kept.
        benign: Rows of `messages` or `prompt` + `completion`, of which as many as make up the share are drawn, none
            that is among the normal ones too. The reply, of a conversation one at random and the last that is kept, is
            replaced by the refusal.
        processing_class: Tokenizer or processor.
        refusals: Refused rows as a share of the mixture. The authors mix 2,000 into 5,000.
        refusal: What replaces a reply.
        mask_eos: Whether the end of the turn after a refusal carries no loss, as in the authors' code.
        max_length: Rows are cut to this many tokens, at the end.
        seed: Of the draw and the order.

    Returns:
        Rows in random order, with `input_ids`, `attention_mask` and `labels`.

    Raises:
        ConfigurationError: A setting is outside its range.
        DataError: A row has no known form, or there are too few benign rows.
    """
    require_share("refusal_mix", "refusals", refusals)
    if not refusal.strip():
        raise ConfigurationError(f"refusal_mix: refusal={refusal!r} has no words")
    required_tokenizer(processing_class)
    own = rows_of(normal, "normal")
    taken = {_identity(row) for row in own}
    others = [row for row in rows_of(benign, "benign") if _identity(row) not in taken]
    kept = read_safety_data(own, processing_class, max_length, purpose="normal")
    places = drawn(count_of_share(refusals, len(kept)), len(others), seed, what="benign")
    rows = [_refused(place, others[place], refusal, seed) for place in places]
    refused = read_safety_data(rows, processing_class, max_length, purpose="benign") if rows else []
    if mask_eos:
        refused = [_without_closing(sequence, processing_class) for sequence in refused]
    warn(f"refusal_mix: {len(refused)} benign prompts are refused, so benign prompts will be; {OVER_REFUSAL}")
    return to_dataset(_shuffled([*kept, *refused], seed))


def balance(
    general: Source,
    processing_class: ProcessingClass | None = None,
    *,
    explicit: Source = (),
    intent: Source = (),
    mixed: Source = (),
    ratios: Mapping[str, tuple[float, float]] = PAPER,
    max_length: int | None = None,
    seed: int = 0,
) -> "Dataset":
    """Mix kinds of safety data into general data at the ratios of Equilibrate RLHF (arXiv 2502.11555).

    Of each kind as many rows are drawn as its upper ratio allows, or all where there are fewer.

    Args:
        general: General rows; all of them are kept.
        processing_class: Tokenizer or processor; not needed where all rows are tokenised.
        explicit: Prompts that ask for harmful facts, with safe replies.
        intent: Prompts of harmful intent, with safe replies.
        mixed: Prompts of both.
        ratios: For each kind the least and the most of its rows for one general row.
        max_length: Rows are cut to this many tokens, at the end.
        seed: Of the draw and the order.

    Returns:
        Rows in random order, with `input_ids`, `attention_mask` and `labels`.

    Raises:
        ConfigurationError: The ratios are not those of the three kinds.
        DataError: A row has no known form, or no safety data is given.
    """
    _check_ratios(ratios)
    kinds = {
        "explicit": rows_of(explicit, "explicit"),
        "intent": rows_of(intent, "intent"),
        "mixed": rows_of(mixed, "mixed"),
    }
    if not any(kinds.values()):
        raise DataError("balance: there are no safety rows; give explicit, intent or mixed")
    sequences = read_safety_data(general, processing_class, max_length, purpose="general")
    mixture, complaints = list(sequences), []
    for kind, rows in kinds.items():
        least, most = (round(ratio * len(sequences), 6) for ratio in ratios[kind])
        count = min(len(rows), math.floor(most))
        if rows and count < least:
            complaints.append(f"{count} rows of {kind} are fewer than the {math.ceil(least)} that its ratio asks for")
        if count > round(PAPER[kind][1] * len(sequences), 6):
            complaints.append(f"{count} rows of {kind} are more than the paper found useful")
        chosen = [rows[place] for place in drawn(count, len(rows), seed, what=kind)]
        mixture += read_safety_data(chosen, processing_class, max_length, purpose=kind) if chosen else []
    if complaints:
        warn(f"balance: {'; '.join(complaints)}, among {len(sequences)} general rows; {OVER_REFUSAL}")
    return to_dataset(_shuffled(mixture, seed))


def _check_ratios(ratios: Mapping[str, tuple[float, float]]) -> None:
    if set(ratios) != set(PAPER):
        raise ConfigurationError(f"balance: ratios has the keys {sorted(ratios)}; expected {sorted(PAPER)}")
    for kind, (least, most) in ratios.items():
        require_number("balance", f"ratios[{kind!r}][1]", most, "in [0, 1]", lambda value: 0 <= value <= 1)
        require_number("balance", f"ratios[{kind!r}][0]", least, "in [0, 1]", lambda value: 0 <= value <= 1)
        if least > most:
            raise ConfigurationError(f"balance: ratios[{kind!r}] asks for at least {least} and at most {most}")


def _shuffled(sequences: Sequence[SafetySequence], seed: int) -> list[SafetySequence]:
    return random.Random(f"order {seed}").sample(list(sequences), len(sequences))


def _identity(row: Mapping[str, Any]) -> str:
    return json.dumps({key: row[key] for key in sorted(row) if row[key] is not None}, sort_keys=True, default=str)


def _refused(number: int, row: Mapping[str, Any], refusal: str, seed: int) -> dict[str, Any]:
    extras = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
    if row.get("messages"):
        messages = list(row["messages"])
        replies = [place for place, turn in enumerate(messages) if place and turn.get("role") == "assistant"]
        if replies:
            last = random.Random(f"turn {seed} {number}").choice(replies)
            return {"messages": [*messages[:last], {"role": "assistant", "content": refusal}], **extras}
    if row.get("prompt") and row.get("completion"):
        return {"prompt": row["prompt"], "completion": in_place_of(row["completion"], refusal), **extras}
    raise DataError(
        f"benign: a row with the keys {sorted(row)} has no reply that could be replaced; give 'messages' with an "
        "assistant turn, or 'prompt' + 'completion'"
    )


def _without_closing(sequence: SafetySequence, processing_class: ProcessingClass) -> SafetySequence:
    length = closing_length(sequence, processing_class)
    kept = sequence.labels[: len(sequence.labels) - length]
    return SafetySequence(input_ids=sequence.input_ids, labels=kept + (IGNORED,) * length)
