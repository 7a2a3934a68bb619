"""How likely a model finds given responses: negative log-likelihood in nats per token.

Symbols: `labels_bt` are the tokens to predict, [batch, tokens]; `logits_bv` the predictions of those that count.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.forward import batches_of_equal_length, forward_arguments, require_fit
from safedelta_hf.capture.safety_data import IGNORED, SafetySequence
from safedelta_hf.capture.undisturbed import undisturbed
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError, NumericalError


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
        CaptureError: The model returns no logits.
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
    with undisturbed(model):
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
    labels = torch.tensor([sequence.labels for sequence in batch], device=device)
    labels_bt = labels[:, 1:]
    counts = labels_bt != IGNORED
    output = model(**forward_arguments(model, input_ids, labels))
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"{type(model).__name__} returns no logits to tell likelihoods by")
    logits_bv = logits[:, :-1][counts]
    # Half precision would round the losses; what is finer than float32 stays as it is.
    logits_bv = logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits_bv, labels_bt[counts].to(logits_bv.device), reduction="none")
    return [tuple(one.tolist()) for one in torch.split(losses.cpu(), counts.sum(1).tolist())]
