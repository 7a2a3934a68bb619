"""How likely a model finds given responses."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.collect import batches_of_equal_length, forward_arguments
from safedelta_hf.capture.safety_data import IGNORED, SafetySequence
from safedelta_hf.capture.undisturbed import undisturbed
from safedelta_hf.errors import CaptureError


def negative_log_likelihoods(
    model: nn.Module, sequences: Sequence[SafetySequence], *, batch_size: int = 8, progress: bool = False
) -> list[float]:
    """Mean negative log-likelihood of each response under a model, given its prompt.

    Args:
        model: A causal language model on any device; it is left as it was.
        sequences: Tokenised examples.
        batch_size: Sequences per forward pass, at most; batches hold sequences of one length and no padding.
        progress: Whether to show a progress bar.

    Returns:
        Nats per response token, one value for each sequence, in their order.

    Raises:
        CaptureError: The model returns no logits.
    """
    device = next(model.parameters()).device
    found: dict[int, float] = {}
    batches = list(batches_of_equal_length(sequences, batch_size))
    with undisturbed(model):
        for batch in tqdm(batches, desc="Reading refusals", unit="batch", disable=not progress, leave=False):
            input_ids = torch.tensor([sequence.input_ids for sequence in batch], device=device)
            labels = torch.tensor([sequence.labels for sequence in batch], device=device)
            logits = getattr(model(**forward_arguments(model, input_ids, labels)), "logits", None)
            if not isinstance(logits, Tensor):
                raise CaptureError(f"{type(model).__name__} returns no logits to tell likelihoods by")
            for sequence, value in zip(batch, _mean_losses(logits, labels), strict=True):
                found[id(sequence)] = value
    return [found[id(sequence)] for sequence in sequences]


def _mean_losses(logits: Tensor, labels: Tensor) -> list[float]:
    means = []
    for row, targets in zip(logits[:, :-1], labels[:, 1:], strict=True):  # one by one: vocabularies are wide
        answered = targets != IGNORED
        losses = nn.functional.cross_entropy(row[answered].float(), targets[answered].to(row.device), reduction="sum")
        means.append(float(losses.double() / answered.sum()))
    return means
