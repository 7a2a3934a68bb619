"""How a base begins its refusals, and how likely it is to begin its answer to a prompt in that way."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Final

import torch
from torch import nn

from safedelta_hf.data.batches import arguments_of, forward_guard, require_fit, share_of
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.predictions import next_token_logits
from safedelta_hf.data.refusals import require_likelihoods
from safedelta_hf.data.templates import ProcessingClass, opening_of
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ConfigurationError, NumericalError
from safedelta_hf.modules.evaluating import evaluating, without_adapters
from safedelta_hf.report.progress import progress_bar

Tokens = tuple[int, ...]

DEPTH: Final = 3
"""Tokens of a refusal that count. The first alone would not do: "I'm sorry" and "I'm happy to" begin alike."""

REFUSED: Final = 0.5
"""Probability of beginning as a refusal above which a base is taken to refuse: greedy decoding, as a rule, would."""

LEAST: Final = 0.01
"""Beginnings that are less likely are not followed further, and count with nothing."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Examples as a base is asked about them.

    Attributes:
        openings: How refusals begin: their first tokens, at most `DEPTH`.
        refusals: Prompts of the refusals, each once.
        prompts: Prompt of each example; None where none can be told from its response.
        refusing: Whether the response of each example itself begins as refusals do.
    """

    openings: frozenset[Tokens]
    refusals: tuple[Tokens, ...]
    prompts: tuple[Tokens | None, ...]
    refusing: tuple[bool, ...]


def asked(
    examples: Sequence[SafetySequence],
    refusals: Sequence[SafetySequence],
    processing_class: ProcessingClass | None = None,
) -> Asked:
    """Find out what a base has to be asked, to know which examples it would refuse.

    What a chat template puts before each response, such as an empty thought, is said by nobody and left to the prompt.

    Args:
        examples: Tokenised examples.
        refusals: Tokenised harmful prompts with the responses of a safe model.
        processing_class: Tokenizer or processor; its chat template tells where the response begins in examples all of
            whose tokens are labelled.

    Returns:
        Prompts, and openings of refusals; none of either where no prompt of the refusals can be told.
    """
    opening = opening_of(processing_class)
    split, known = ([divided(one, opening.tokens) for one in some] for some in (examples, refusals))
    responses = [response for _, response in filter(None, split + known)]
    shared = min(opening.added, len(commonprefix(responses)))
    openings = {response[shared : shared + DEPTH] for _, response in filter(None, known)} - {()}
    # One that begins another says all that the longer one says.
    openings = {one for one in openings if not any(one[:size] in openings for size in range(1, len(one)))}
    return Asked(
        openings=frozenset(openings),
        refusals=tuple(dict.fromkeys(prompt + response[:shared] for prompt, response in filter(None, known))),
        prompts=tuple(None if one is None or not openings else one[0] + one[1][:shared] for one in split),
        refusing=tuple(
            one is not None and any(one[1][shared : shared + len(head)] == head for head in openings) for one in split
        ),
    )


def divided(sequence: SafetySequence, opening: Tokens = ()) -> tuple[Tokens, Tokens] | None:
    """Prompt and response of an example.

    Args:
        sequence: The example. Where it holds several responses, the last is meant.
        opening: What opens a response; where all tokens are labelled, the response begins after the last of these.

    Returns:
        Token ids of both; None where they cannot be told apart, or one of them is missing.
    """
    tokens, labels = sequence.input_ids, sequence.labels
    end = max((place for place, label in enumerate(labels) if label != IGNORED), default=-1)
    start = next((place + 1 for place in range(end, -1, -1) if labels[place] == IGNORED), 0)
    if start == 0 and opening:
        size = len(opening)
        ends = range(len(tokens) - 1, size - 1, -1)
        start = next((place for place in ends if tokens[place - size : place] == opening), 0)
    return (tokens[:start], tokens[start : end + 1]) if 0 < start <= end else None


def refusal_probabilities(
    model: ShardedModel,
    prompts: Sequence[Tokens],
    openings: Collection[Tokens],
    *,
    batch_size: int = 8,
    progress: bool = False,
    desc: str = "Asking the base",
) -> list[float]:
    """How likely a model is to begin its answer to each prompt as refusals begin.

    One forward pass for each prompt; where the first token alone does not settle it, one more for each further token
    and likely beginning. Nothing is generated.

    Args:
        model: The base model; adapters on it are disabled meanwhile. Its ranks share the work, and all get the result.
        prompts: Token ids of each prompt, up to where the response begins.
        openings: Token ids that refusals begin with, none of which begins another.
        batch_size: Prompts of one length per forward pass, at most.
        progress: Whether to show a progress bar.
        desc: What the progress bar says.

    Returns:
        For each prompt, in their order, the probability that its answer begins with one of the openings, computed in
        float64 from the model's logits. Where that is at most `REFUSED`, it may be that of beginning with the first
        tokens of one, which is never less. Beginnings of a probability below `LEAST` count with nothing.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        NumericalError: The model's logits are NaN or Inf.
    """
    is_shown = progress and bool(prompts) and model.ranks.is_main
    with (
        model.ranks.together(),
        without_adapters(model.model),
        progress_bar(total=0, desc=desc, unit="batch", disable=not is_shown) as bar,
    ):
        if batch_size < 1:
            raise ConfigurationError(f"batch_size: must be at least 1, got {batch_size}")
        require_likelihoods(model.model)
        masses: dict[Tokens, dict[Tokens, float]] = {prompt: {(): 1.0} for prompt in prompts}
        for depth in range(max(map(len, openings), default=0)):
            following = _following(openings, depth)
            likely = {
                (prompt, start): mass
                for prompt, own in masses.items()
                if sum(own.values()) > REFUSED
                for start, mass in own.items()
                if start in following and mass >= LEAST
            }
            sequences = [SafetySequence(input_ids=prompt + start, labels=prompt + start) for prompt, start in likely]
            require_fit(model.runnable, [sequence.input_ids for sequence in sequences], "prompts")
            wanted = sorted({token for tokens in following.values() for token in tokens})
            found = _next_tokens(model, sequences, wanted, batch_size, bar)
            longer: dict[Tokens, dict[Tokens, float]] = {prompt: {} for prompt, _ in likely}
            for (prompt, start), mass in likely.items():
                after = found[prompt + start]
                longer[prompt] |= {(*start, token): mass * after[token] for token in following[start]}
            for prompt, own in longer.items():
                whole = {start: mass for start, mass in masses[prompt].items() if start not in following}
                masses[prompt] = whole | own
        return [sum(masses[prompt].values()) for prompt in prompts]


def _following(openings: Collection[Tokens], depth: int) -> dict[Tokens, list[int]]:
    # What follows each beginning of that length, where something does.
    found: dict[Tokens, list[int]] = {}
    for opening in sorted(openings):
        if len(opening) > depth and opening[depth] not in found.setdefault(opening[:depth], []):
            found[opening[:depth]].append(opening[depth])
    return found


def _next_tokens(
    model: ShardedModel,
    sequences: Sequence[SafetySequence],
    wanted: Sequence[int],
    batch_size: int,
    bar: Any,  # noqa: ANN401 - of tqdm
) -> Mapping[Tokens, Mapping[int, float]]:
    # The probability of each wanted token after each sequence.
    ranks, runnable = model.ranks, model.runnable
    found: dict[Tokens, dict[int, float]] = {}
    share = share_of(list(dict.fromkeys(sequences)), batch_size, model) if sequences else []
    ranks.check_in()  # in a collective forward pass no rank could hear of another that has failed before
    with evaluating(runnable):
        bar.total += len(share)
        for batch, counts in share:
            with forward_guard(model):
                rows = _batch_probabilities(runnable, batch, wanted)
            if counts:
                found.update(
                    (one.input_ids, dict(zip(wanted, row, strict=True))) for one, row in zip(batch, rows, strict=True)
                )
            bar.update()
    everyone = {tokens: row for own in ranks.gather(found) for tokens, row in own.items()}
    if not all(0 <= value <= 1 for row in everyone.values() for value in row.values()):
        raise NumericalError("the base's logits after a prompt are NaN or Inf; are its weights intact?")
    return everyone


def _batch_probabilities(model: nn.Module, batch: Sequence[SafetySequence], wanted: Sequence[int]) -> list[list[float]]:
    shape = (len(batch), len(batch[0].input_ids))
    output = model(**arguments_of(model, batch))
    logits_bv = next_token_logits(model, output, shape, largest=max(wanted))[:, -1].to(torch.float64)
    probabilities: list[list[float]] = logits_bv.softmax(-1)[:, list(wanted)].tolist()
    return probabilities
