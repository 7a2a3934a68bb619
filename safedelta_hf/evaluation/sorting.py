"""The examples of a task that its base would refuse: which they are, and whether it is they or the base that is odd."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.openings import REFUSED, Tokens, asked, refusal_probabilities
from safedelta_hf.data.templates import ProcessingClass, tokenizer_of
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ArchitectureError, NothingLeftError, warn
from safedelta_hf.evaluation.hidden_states import last_states
from safedelta_hf.modules.evaluating import without_adapters
from safedelta_hf.records.sorting import Outcome, RefusedExample, TaskSorting

logger = logging.get_logger(__name__)

MANY: Final = 0.25
"""Share of refused examples above which it is asked whether the data is harmful or the base refuses too much."""

MOST: Final = 0.5
"""Share of these that have to be near to the safety data for the data to look harmful."""

FAR: Final = 0.05
"""Share of the safety data's own prompts that count as far from the others: the lower quantile of their nearness."""

SHOWN: Final = 5
SHOWN_CHARACTERS: Final = 120
_CHUNK: Final = 64
"""Prompts whose hidden states in all layers are held at a time."""


class Sorted(NamedTuple):
    """A task without what its base would refuse.

    Attributes:
        kept: The examples that are left, in order.
        sorting: What was found.
    """

    kept: list[SafetySequence]
    sorting: TaskSorting


def sort_task(
    model: ShardedModel,
    examples: Sequence[SafetySequence],
    refusals: Sequence[SafetySequence],
    processing_class: ProcessingClass | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> Sorted:
    """Leave those examples of a task out that its base would refuse.

    What the base refuses is what the safety data holds it to; counted as the task, it would be protected from that.

    Args:
        model: The base model; adapters on it are disabled meanwhile. Its ranks come to the same result.
        examples: Tokenised examples of the fine-tuning data.
        refusals: Tokenised safety data.
        processing_class: Tokenizer or processor, to tell prompts in unlabelled examples by its chat template, and to
            show some as text.
        batch_size: Prompts per forward pass, at most.
        progress: Whether to show a progress bar.

    Returns:
        What is left, and what was found.

    Raises:
        NothingLeftError: Nothing is left.
    """
    questions = asked(examples, refusals, processing_class)
    judged = {row: prompt for row, prompt in enumerate(questions.prompts) if prompt is not None}
    found = refusal_probabilities(
        model,
        list(judged.values()),
        questions.openings,
        batch_size=batch_size,
        progress=progress,
        desc="Sorting the task",
    )
    sure = {row: value for row, value in zip(judged, found, strict=True) if value > REFUSED}
    outcome = Outcome.SORTED
    near: set[int] | None = None
    if len(sure) > MANY * len(examples):
        outcome, near = verdict(model, {row: judged[row] for row in sure}, questions.refusals, batch_size)
    left_out = {Outcome.OVER_REFUSAL: near, Outcome.UNKNOWN: set[int]()}.get(outcome, set(sure))
    assert left_out is not None
    sorting = TaskSorting(
        outcome=outcome,
        examples=len(examples),
        refused=len(sure),
        near=None if near is None else len(near),
        left_out=len(left_out),
        unjudged=len(examples) - len(judged),
        shown=_shown({row: sure[row] for row in left_out or sure}, judged, processing_class),
    )
    if model.ranks.is_main:
        _tell(sorting)
    if sorting.is_empty:
        raise NothingLeftError(sorting.warning, sorting)
    return Sorted([one for row, one in enumerate(examples) if row not in left_out], sorting)


def verdict(
    model: ShardedModel, refused: dict[int, Tokens], refusals: Sequence[Tokens], batch_size: int = 8
) -> tuple[Outcome, set[int] | None]:
    """Tell whether many refused prompts speak against the data, or against the base.

    A base that refuses too much refuses what is unlike the harmful prompts of the safety data too. Likeness is the
    cosine to the nearest of those, of hidden states in the middle layer at the last token of the prompt; a prompt is
    near if it is as like to one of them as all but the farthest `FAR` of themselves are to one another.

    Args:
        model: The base model; adapters on it are disabled meanwhile.
        refused: Prompts that it would refuse, by any number.
        refusals: Prompts of the safety data, each once.
        batch_size: Prompts per forward pass, at most.

    Returns:
        What it looks like, and the numbers of the prompts that are near; None where nothing tells.
    """
    if len(refusals) < 2:
        return Outcome.UNKNOWN, None
    with model.ranks.together(), without_adapters(model.model):
        try:
            known_sh, asked_ph = (
                _middle_states(model, list(some), batch_size) for some in (refusals, refused.values())
            )
        except ArchitectureError:
            return Outcome.UNKNOWN, None
    own_ss = known_sh @ known_sh.T
    own_ss.fill_diagonal_(-2.0)  # below any cosine
    least = own_ss.amax(1).quantile(FAR)
    likeness_p = (asked_ph @ known_sh.T).amax(1)
    # Processes that read alike may round otherwise.
    near = model.ranks.broadcast(
        {row for row, value in zip(refused, likeness_p.tolist(), strict=True) if value >= least}, owner=0
    )
    return Outcome.HARMFUL if len(near) >= MOST * len(refused) else Outcome.OVER_REFUSAL, near


def _middle_states(model: ShardedModel, prompts: Sequence[Tokens], batch_size: int) -> Tensor:
    # Of unit length, [prompts, hidden], in float64.
    states = []
    for start in range(0, len(prompts), _CHUNK):
        states_plh = last_states(model.runnable, prompts[start : start + _CHUNK], batch_size=batch_size)[:, 0]
        states.append(states_plh[:, states_plh.shape[1] // 2].to(torch.float64))
    return normalize(torch.cat(states), dim=-1)


def _shown(
    sure: dict[int, float], prompts: dict[int, Tokens], processing_class: ProcessingClass | None
) -> tuple[RefusedExample, ...]:
    first = sorted(sure, key=lambda row: (-sure[row], row))[:SHOWN]
    return tuple(
        RefusedExample(row=row, probability=sure[row], prompt=prompt_text(prompts[row], processing_class))
        for row in first
    )


def prompt_text(prompt: Tokens, processing_class: ProcessingClass | None) -> str:
    """The end of a prompt, in a line.

    Args:
        prompt: Its token ids.
        processing_class: Tokenizer or processor, or None.

    Returns:
        At most `SHOWN_CHARACTERS` of it, without special tokens; nothing without a tokenizer.
    """
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer is None:
        return ""
    text = " ".join(str(tokenizer.decode(list(prompt), skip_special_tokens=True)).split())
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= SHOWN_CHARACTERS else f"...{text[-SHOWN_CHARACTERS + 3 :]}"


def _tell(sorting: TaskSorting) -> None:
    if sorting.warning:
        warn(f"{sorting.warning}\n{sorting.told}".rstrip())
    elif sorting.left_out:
        logger.warning("Safe Delta: %s The surest:\n%s", sorting.summary, sorting.told)
    elif sorting.unjudged == sorting.examples:
        logger.warning("Safe Delta: %s", sorting.summary)
