"""Safety data that no moment has seen, by which refusals are measured."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn

from safedelta_hf.capture.likelihood import response_losses
from safedelta_hf.capture.safety_data import IGNORED, SafetySequence
from safedelta_hf.capture.undisturbed import without_adapters
from safedelta_hf.ranks import Ranks
from safedelta_hf.sharding.holding import Holding


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How much less likely refusals have become than under the base model, in nats per response token.

    Attributes:
        mean: Mean rise of the negative log-likelihood over examples.
        upper: Upper quantile of the rise over examples.
    """

    mean: float
    upper: float


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
        model: nn.Module,
        sequences: Sequence[SafetySequence],
        batch_size: int,
        *,
        ranks: Ranks | None = None,
        holding: Holding | None = None,
    ) -> "HeldOut":
        """Let the base model read the examples.

        Args:
            model: The base model; adapters on it are disabled meanwhile.
            sequences: Tokenised examples.
            batch_size: Sequences per forward pass, at most.
            ranks: Ranks that share the work; None for this process alone.
            holding: How they hold the model's parameters; None where each holds all of them.

        Returns:
            The examples with their likelihood; the same on all ranks.
        """
        with without_adapters(model):
            losses = response_losses(model, sequences, batch_size=batch_size, ranks=ranks, holding=holding)
        return cls(sequences=tuple(sequences), losses=tuple(map(fmean, losses)))

    def drift(
        self,
        model: nn.Module,
        *,
        quantile: float,
        batch_size: int = 8,
        ranks: Ranks | None = None,
        holding: Holding | None = None,
    ) -> Drift:
        """How far a model has come from the base model's refusals.

        Args:
            model: A fine-tune of the base model.
            quantile: Which upper quantile over examples to give.
            batch_size: Sequences per forward pass, at most.
            ranks: Ranks that share the work; None for this process alone.
            holding: How they hold the model's parameters; None where each holds all of them.

        Returns:
            The rise of the negative log-likelihood; the same on all ranks.
        """
        losses = response_losses(model, self.sequences, batch_size=batch_size, ranks=ranks, holding=holding)
        pairs = zip(map(fmean, losses), self.losses, strict=True)
        rises = torch.tensor([now - before for now, before in pairs]).double()
        return Drift(mean=float(rises.mean()), upper=float(rises.quantile(quantile)))


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
    topics = _topics(sequences)
    order = {topic: number for number, topic in enumerate(dict.fromkeys(topics))}
    aside = [int((order[topic] + 1) * share) > int(order[topic] * share) for topic in topics]
    used = [sequence for sequence, held in zip(sequences, aside, strict=True) if not held]
    return used, [sequence for sequence, held in zip(sequences, aside, strict=True) if held]


def _topics(sequences: Sequence[SafetySequence]) -> list[int]:
    prompts = [
        {token for token, label in zip(sequence.input_ids, sequence.labels, strict=True) if label == IGNORED}
        or set(sequence.input_ids)
        for sequence in sequences
    ]
    frequency = Counter(token for prompt in prompts for token in prompt)
    return [min(prompt, key=lambda token: (frequency[token], token)) for prompt in prompts]
