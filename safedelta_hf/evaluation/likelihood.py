"""How likely a model finds given refusals: negative log-likelihood in nats per token."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from safedelta_hf.data.dataset import ProcessingClass, digest_of, read_safety_data
from safedelta_hf.data.refusals import response_losses
from safedelta_hf.distributed.model import ShardedModel

UPPER = 0.95
"""The upper quantile over examples that is reported beside the mean."""


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Negative log-likelihood of given responses.

    Attributes:
        losses: Mean over the response tokens of each example, in nats per token, in the order of the data.
        data: SHA-256 of the tokenised data.
    """

    losses: tuple[float, ...]
    data: str

    @property
    def mean(self) -> float:
        """Mean over examples, whatever their lengths."""
        return sum(self.losses) / len(self.losses)

    @property
    def upper(self) -> float:
        """The 95 % quantile over examples, with linear interpolation."""
        return float(torch.quantile(torch.tensor(self.losses, dtype=torch.float64), UPPER))


def refusal_likelihood(
    model: nn.Module,
    refusals: str | Path | Iterable[Mapping[str, Any]],
    processing_class: ProcessingClass | None = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: bool = False,
) -> Likelihood:
    """Measure how likely a model finds given refusals, or any other responses.

    No response is generated: each example costs one forward pass. The model is left as it was.

    Args:
        model: A causal language model, adapters included, on any device.
        refusals: Prompts with the refusals to them: a Dataset, a list of dicts, or the path of a JSON-lines file, in
            any form that TRL takes.
        processing_class: Tokenizer or processor; not needed for tokenised data.
        batch_size: Sequences per forward pass, at most; batches hold sequences of one length and no padding.
        max_length: Sequences are cut to this many tokens.
        progress: Whether to show a progress bar.

    Returns:
        The loss of each example.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        DataError: The data is empty, has no responses, or does not fit the model.
        NumericalError: The model's loss is NaN or Inf.
    """  # noqa: DOC502 - raised by the functions called
    sequences = read_safety_data(refusals, processing_class, max_length)
    losses = response_losses(
        ShardedModel(model), sequences, batch_size=batch_size, progress=progress, desc="Refusal likelihood"
    )
    return Likelihood(losses=tuple(map(fmean, losses)), data=digest_of(sequences))
