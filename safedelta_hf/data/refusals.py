"""Safety data that no moment has seen, and how likely a model finds it: refusals are measured by it."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safedelta_hf.data.batches import Batch
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.predictions import read_predictions
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, NumericalError
from safedelta_hf.modules.evaluating import coarsest, precision_seen, rounding_otherwise, without_adapters
from safedelta_hf.modules.names import class_name, embeddings, unwrapped
from safedelta_hf.report.search import ReadingNoise


def tells_likelihoods(model: nn.Module) -> bool:
    """Whether a model says how likely tokens are, as far as is known before it runs.

    Args:
        model: Any model, whatever wraps it.

    Returns:
        False for a model of transformers that has no output embeddings, such as a classifier or a reward model.
    """
    bare = unwrapped(model)
    if not isinstance(bare, PreTrainedModel):
        return True
    return embeddings(bare, "output") is not None or bool(bare.can_generate())


def is_language_model(model: nn.Module) -> bool:
    """Whether a model is known to say how likely tokens are.

    Args:
        model: Any model, whatever wraps it.

    Returns:
        False for a module that is not of transformers too, which may return no logits.
    """
    return isinstance(unwrapped(model), PreTrainedModel) and tells_likelihoods(model)


def require_likelihoods(model: nn.Module) -> None:
    """Stop before something is measured that a model does not say.

    Args:
        model: Any model, whatever wraps it.

    Raises:
        CaptureError: It does not say how likely tokens are.
    """
    if not tells_likelihoods(model):
        raise CaptureError(
            f"{class_name(model)} classifies and does not say how likely tokens are, so neither can a strength be "
            "measured on it nor data be held out for that; give the strength as a number, such as Ridge(strength=1.0), "
            "and ProfileConfig(holdout=0) or none"
        )


BEGINNING = 5
"""Response tokens that decide whether a refusal is begun; alignment hardly reaches beyond (arXiv 2406.05946)."""

CLEARLY = 2.0
"""How much likelier than any other a token is that a model is sure of; a smaller lead is soon lost, by rounding too."""


@dataclass(frozen=True, kw_only=True)
class ResponseReading:
    """How a model finds the tokens of one response, each given all tokens before it.

    Attributes:
        losses: Negative log-likelihood of each, in nats.
        greedy: How many of them, from the first on, are the most likely token of their place: as far as greedy decoding
            goes along.
        sure: How many are that by a clear lead.
    """

    losses: tuple[float, ...]
    greedy: int
    sure: int

    @property
    def begins(self) -> bool:
        """Whether greedy decoding begins the response so."""
        return self.greedy >= min(BEGINNING, len(self.losses))

    @property
    def surely_begins(self) -> bool:
        """Whether it does, and every token of the beginning leads clearly."""
        return self.sure >= min(BEGINNING, len(self.losses))

    @property
    def surprise(self) -> float:
        """Negative log-likelihood of the beginning, in nats."""
        return fsum(self.losses[:BEGINNING])


def read_responses(
    model: ShardedModel,
    sequences: Sequence[SafetySequence],
    *,
    batch_size: int = 8,
    desc: str | None = None,
    bar: Any = None,  # noqa: ANN401 - of tqdm
) -> list[ResponseReading]:
    """Let a model read responses, and how it finds every token of them.

    Args:
        model: A causal language model; its ranks share the work, and all get the result.
        sequences: Tokenised examples.
        batch_size: Sequences per forward pass, at most.
        desc: What a progress bar says, on the main process; None shows none.
        bar: A bar of a larger work, to be moved by every sequence that this process reads; None for none.

    Returns:
        For each sequence, in their order, how the model finds its response tokens. The first token of a sequence has
        nothing before it, and is left out.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        DataError: A sequence is longer than the model takes, or no response token of it has one before it.
        CaptureError: The model does not return the logits of each next token.
        NumericalError: A loss is NaN or Inf.
        RankError: Another rank failed.
    """
    with model.ranks.together():
        require_likelihoods(model.model)
    readings = read_predictions(model, sequences, _read_batch, batch_size=batch_size, desc=desc, bar=bar)
    for number, reading in enumerate(readings):
        if not all(map(math.isfinite, reading.losses)):
            raise NumericalError(f"row {number}: the loss of the model is NaN or Inf; are its weights intact?")
    return readings


def response_losses(
    model: ShardedModel,
    sequences: Sequence[SafetySequence],
    *,
    batch_size: int = 8,
    desc: str | None = None,
) -> list[tuple[float, ...]]:
    """Negative log-likelihood of every response token, given all tokens before it.

    Args:
        model: A causal language model; its ranks share the work, and all get the result.
        sequences: Tokenised examples.
        batch_size: Sequences per forward pass, at most.
        desc: What a progress bar says, on the main process; None shows none.

    Returns:
        For each sequence, in their order, the losses of its response tokens in nats. The first token of a sequence
        has nothing before it, and no loss.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        DataError: A sequence is longer than the model takes, or no response token of it has one before it.
        CaptureError: The model does not return the logits of each next token.
        NumericalError: A loss is NaN or Inf.
        RankError: Another rank failed.
    """
    readings = read_responses(model, sequences, batch_size=batch_size, desc=desc)
    return [reading.losses for reading in readings]


def _read_batch(logits_nv: Tensor, batch: Batch) -> list[ResponseReading]:
    targets = [[label for label in sequence.labels[1:] if label != IGNORED] for sequence in batch]
    targets_n = torch.tensor([label for own in targets for label in own], device=logits_nv.device)
    losses_n = nn.functional.cross_entropy(logits_nv, targets_n, reduction="none")
    best_n2, tokens_n2 = logits_nv.topk(min(2, logits_nv.shape[1]), dim=-1)
    hits_n = tokens_n2[:, 0] == targets_n
    sure_n = hits_n & (best_n2[:, 0] - best_n2[:, -1] >= math.log(CLEARLY))
    lengths = list(map(len, targets))
    split = (torch.split(one.cpu(), lengths) for one in (losses_n, hits_n, sure_n))
    return [
        ResponseReading(losses=tuple(losses.tolist()), greedy=_leading(hits), sure=_leading(sure))
        for losses, hits, sure in zip(*split, strict=True)
    ]


def _leading(hits: Tensor) -> int:
    return int(hits.int().cumprod(0).sum())


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What a model has lost of the base model's refusals.

    Attributes:
        lost: How many of those that the base surely begins, under greedy decoding, are no longer begun. Others cannot
            be lost.
        probability_lost: Mean share of its probability that the beginning of a refusal has lost, over all that were
            read; what has become more likely counts as 0.
        standard_error: Of that mean; 0 of one refusal alone.
    """

    lost: int
    probability_lost: float
    standard_error: float = 0.0

    @classmethod
    def between(cls, base: Sequence[ResponseReading], now: Sequence[ResponseReading]) -> "Drift":
        """Compare two readings of the same refusals.

        Args:
            base: How the base model finds them.
            now: How another model finds them, in the same place.

        Returns:
            What it has lost.
        """
        pairs = list(zip(base, now, strict=True))
        shares = [1 - math.exp(min(before.surprise - after.surprise, 0.0)) for before, after in pairs]
        mean, others = fmean(shares), max(len(shares) - 1, 1)
        return cls(
            lost=sum(before.surely_begins and not after.begins for before, after in pairs),
            probability_lost=mean,
            standard_error=math.sqrt(fsum((share - mean) ** 2 for share in shares) / others / len(shares)),
        )

    def probability_lost_at_most(self, confidence: float) -> float:
        """Share of their probability that the beginnings of all such refusals have lost at most, on the mean.

        Args:
            confidence: How often that holds, in (0, 1), as far as means of so many are distributed normally.

        Returns:
            The upper end of a one-sided interval; never below the mean that was measured.
        """
        deviations = max(NormalDist().inv_cdf(confidence), 0.0)
        return self.probability_lost + deviations * self.standard_error


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Refusals kept aside, and how likely the base model finds them.

    Attributes:
        sequences: Tokenised examples.
        losses: Negative log-likelihood of each under the base model, in nats per response token.
    """

    sequences: tuple[SafetySequence, ...]
    losses: tuple[float, ...]

    @classmethod
    def measured(
        cls,
        model: ShardedModel,
        sequences: Sequence[SafetySequence],
        batch_size: int,
        *,
        progress: bool = False,
    ) -> "HeldOut":
        """Let the base model read the examples.

        Args:
            model: The base model; adapters on it are disabled meanwhile.
            sequences: Tokenised examples.
            batch_size: Sequences per forward pass, at most.
            progress: Whether to show a progress bar.

        Returns:
            The examples with their likelihood; the same on all ranks.
        """
        with without_adapters(model.model):
            desc = "Reading what is held out" if progress else None
            losses = response_losses(model, sequences, batch_size=batch_size, desc=desc)
        return cls(sequences=tuple(sequences), losses=tuple(map(fmean, losses)))

    def read(
        self,
        model: ShardedModel,
        *,
        batch_size: int = 8,
        bar: Any = None,  # noqa: ANN401 - of tqdm
    ) -> list[ResponseReading]:
        """Let a model read the examples.

        Args:
            model: The base model, or a fine-tune of it.
            batch_size: Sequences per forward pass, at most.
            bar: A bar of a larger work, to be moved by every example that this process reads; None for none.

        Returns:
            How it finds each of them; the same on all ranks.
        """
        return read_responses(model, self.sequences, batch_size=batch_size, bar=bar)

    def read_again(
        self,
        model: ShardedModel,
        *,
        bar: Any = None,  # noqa: ANN401 - of tqdm
    ) -> tuple[list[ResponseReading], ReadingNoise]:
        """Let the base model read the examples as a fine-tune of it is about to, and measure the noise of that.

        The fine-tune runs in the module that was trained, on the machine and in the batches of now. Compared with what
        the base finds in the same place, a difference is one of weights.

        Args:
            model: What the fine-tune runs in, holding the base weights.
            bar: As in `read`.

        Returns:
            How it finds each of the examples now, and the noise; the same on all ranks.
        """
        with precision_seen(model.model) as seen:
            base = self.read(model, bar=bar)
        names = {name for own in model.ranks.gather(sorted(map(str, seen))) for name in own} or {"torch.float32"}
        dtype = coarsest({getattr(torch, name.removeprefix("torch.")) for name in names})
        with rounding_otherwise(model.model, dtype) as is_moved:
            other = self.read(model, bar=bar) if is_moved else None
        # Either of the two readings might as well have been the other.
        noise = [] if other is None else [Drift.between(base, other), Drift.between(other, base)]
        return base, ReadingNoise(
            precision=str(dtype).removeprefix("torch."),
            lost=max((drift.lost for drift in noise), default=None),
            probability_lost=max((drift.probability_lost for drift in noise), default=None),
        )


def topics(sequences: Sequence[SafetySequence]) -> int:
    """How many different things the prompts are about, as `split` tells them apart.

    Args:
        sequences: Tokenised examples.

    Returns:
        The number.
    """
    return len(set(_topics(sequences)))


def split(sequences: Sequence[SafetySequence], share: float) -> tuple[list[SafetySequence], list[SafetySequence]]:
    """Set a share of the examples aside, spread evenly over their order; the same at each call.

    Prompts whose rarest token is the same are about one thing: if some of them were in the moments, the others would
    measure nothing new. They are held out together or not at all, as in grouped cross-validation.

    Args:
        sequences: Tokenised examples.
        share: Share to hold out, in [0, 1).

    Returns:
        The examples for the moments, and those held out.
    """
    found = _topics(sequences)
    order = {topic: number for number, topic in enumerate(dict.fromkeys(found))}
    aside = [int((order[topic] + 1) * share) > int(order[topic] * share) for topic in found]
    used = [sequence for sequence, is_aside in zip(sequences, aside, strict=True) if not is_aside]
    return used, [sequence for sequence, is_aside in zip(sequences, aside, strict=True) if is_aside]


def _topics(sequences: Sequence[SafetySequence]) -> list[int]:
    prompts = [
        {token for token, label in zip(sequence.input_ids, sequence.labels, strict=True) if label == IGNORED}
        or set(sequence.input_ids)
        for sequence in sequences
    ]
    frequency = Counter(token for prompt in prompts for token in prompt)
    return [min(prompt, key=lambda token: (frequency[token], token)) for prompt in prompts]
