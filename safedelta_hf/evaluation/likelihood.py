"""How likely a model finds given responses: negative log-likelihood in nats per token.

Symbols: `labels_bt` are the tokens to predict, [batch, tokens]; `logits_bv` the predictions of those that count.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from safedelta_hf.capture.collect import batches_of_equal_length
from safedelta_hf.capture.safety_data import IGNORED, ProcessingClass, SafetySequence, digest_of, read_safety_data
from safedelta_hf.errors import ConfigurationError, DataError, NumericalError
from safedelta_hf.evaluation.inference import evaluating, require_fit

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
    losses = response_losses(model, sequences, batch_size=batch_size, progress=progress, desc="Refusal likelihood")
    return Likelihood(losses=tuple(sum(tokens) / len(tokens) for tokens in losses), data=digest_of(sequences))


def response_losses(
    model: nn.Module,
    sequences: Sequence[SafetySequence],
    *,
    batch_size: int = 8,
    progress: bool = False,
    desc: str = "Likelihood",
) -> list[tuple[float, ...]]:
    """Negative log-likelihood of every response token, given all tokens before it.

    Args:
        model: A causal language model, on any device.
        sequences: Tokenised examples.
        batch_size: Sequences per forward pass, at most.
        progress: Whether to show a progress bar.
        desc: What the progress bar says.

    Returns:
        For each sequence, in their order, the losses of its response tokens in nats. The first token of a sequence
        has nothing before it, and no loss.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        DataError: A sequence is longer than the model takes, or no response token of it has one before it.
        NumericalError: A loss is NaN or Inf.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size: must be at least 1, got {batch_size}")
    for number, sequence in enumerate(sequences):
        if all(label == IGNORED for label in sequence.labels[1:]):
            raise DataError(f"row {number}: no response token has a token before it, so it has no likelihood")
    require_fit(model, [sequence.input_ids for sequence in sequences], "sequences")
    # Equal sequences have equal losses, and are computed once.
    found: dict[SafetySequence, tuple[float, ...]] = {}
    batches = list(batches_of_equal_length(list(dict.fromkeys(sequences)), batch_size))
    with evaluating(model):
        for batch in tqdm(batches, desc=desc, unit="batch", disable=not progress):
            found.update(zip(batch, _batch_losses(model, batch), strict=True))
    losses = [found[sequence] for sequence in sequences]
    for number, tokens in enumerate(losses):
        if not all(map(_finite, tokens)):
            raise NumericalError(f"row {number}: the loss of the model is NaN or Inf; are its weights intact?")
    return losses


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _batch_losses(model: nn.Module, batch: Sequence[SafetySequence]) -> list[tuple[float, ...]]:
    device = next(model.parameters()).device
    input_ids = torch.tensor([sequence.input_ids for sequence in batch], device=device)
    labels_bt = torch.tensor([sequence.labels for sequence in batch], device=device)[:, 1:]
    counts = labels_bt != IGNORED
    logits_bv = _logits(model, input_ids)[:, :-1][counts]
    # Half precision would round the losses; what is finer than float32 stays as it is.
    logits_bv = logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits_bv, labels_bt[counts], reduction="none")
    return [tuple(one.tolist()) for one in torch.split(losses.cpu(), counts.sum(1).tolist())]


def _logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        arguments |= {"attention_mask": torch.ones_like(input_ids), "use_cache": False}
    output = model(**arguments)
    logits: Tensor = output["logits"]
    return logits
