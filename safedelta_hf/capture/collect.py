"""One pass of the base model over the safety data."""

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.layers import find_layers
from safedelta_hf.capture.safety_data import SafetySequence
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.capture.undisturbed import undisturbed
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import CaptureError, DataError, NumericalError
from safedelta_hf.names import parameter_names, unwrapped
from safedelta_hf.quantised import is_quantised
from safedelta_hf.records import Role, Use


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What one pass over the safety data found.

    Attributes:
        uses: How each covered parameter is used.
        moments: Moments by key, in host memory.
        skipped: Reason by parameter name for those that cannot be covered.
        storage: What holds the moments; their files, if any, live as long.
    """

    uses: tuple[Use, ...]
    moments: Mapping[str, InputMoment]
    skipped: Mapping[str, str]
    storage: MomentStorage


def capture_moments(
    model: nn.Module,
    sequences: Sequence[SafetySequence],
    *,
    storage: MomentStorage,
    batch_size: int = 8,
    share_moments: bool = True,
    progress: bool = True,
) -> Capture:
    """Read the safety data once and sum the moments of every layer.

    Sequences are batched with others of exactly their length, so no padding ever enters a moment, whatever shapes a
    model's layers see. The model is left as it was, also after an exception.

    Args:
        model: The base model, on any device.
        sequences: Tokenised safety data.
        storage: Where the moments are held while they are summed.
        batch_size: Sequences per forward pass, at most.
        share_moments: Whether layers that read the same tensor share one moment.
        progress: Whether to show a progress bar.

    Returns:
        The moments, and what could not be covered.

    Raises:
        CaptureError: The model has no linear layer, or none was reached, or it is an encoder-decoder model.
    """
    _check_model(model)
    _check_fit(model, sequences)
    layers, skipped = find_layers(model)
    if all(layer.role in (Role.EMBEDDING, Role.SCALE) for layer in layers):
        raise CaptureError(f"{type(model).__name__} has no linear layer (nn.Linear or Conv1D), so nothing to adjust")
    collector = MomentCollector(layers, parameter_names(model), storage, share=share_moments)
    device = next(model.parameters()).device
    batches = list(batches_of_equal_length(sequences, batch_size))
    with undisturbed(model), collector.observing():
        for batch in tqdm(batches, desc="Safety data", unit="batch", disable=not progress):
            collector.start_batch(len(batch), len(batch[0].input_ids))
            _forward(model, batch, device)
    uses, missing = collector.uses()
    if not uses:
        raise CaptureError(f"{type(model).__name__}: the safety data reached no layer; is forward() the right entry?")
    return Capture(
        uses=tuple(uses),
        moments=collector.moments(len(sequences)),
        skipped=_uncovered(skipped | missing, uses),
        storage=storage,
    )


def batches_of_equal_length(
    sequences: Sequence[SafetySequence], batch_size: int
) -> Iterator[tuple[SafetySequence, ...]]:
    """Batches without padding.

    Args:
        sequences: Tokenised examples.
        batch_size: Sequences per batch, at most.

    Yields:
        Batches of sequences of one length, longest first, so that memory trouble shows at once.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids), reverse=True)
    for _, same_length in itertools.groupby(ordered, key=lambda sequence: len(sequence.input_ids)):
        group = tuple(same_length)
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def _forward(model: nn.Module, batch: Sequence[SafetySequence], device: torch.device) -> None:
    input_ids = torch.tensor([sequence.input_ids for sequence in batch], device=device)
    labels = torch.tensor([sequence.labels for sequence in batch], device=device)
    model(**_arguments(model, input_ids, labels))


def _arguments(model: nn.Module, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
    if isinstance(model, PreTrainedModel):
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "use_cache": False}
    arguments: dict[str, Any] = {"input_ids": input_ids}
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        arguments["attention_mask"] = torch.ones_like(input_ids)
    if "labels" in accepted and accepted["labels"].default is inspect.Parameter.empty:
        arguments["labels"] = labels
    return arguments


def _check_model(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder model; only models that read prompt and response as one "
            "sequence are covered"
        )
    for name, parameter in model.named_parameters():
        if not is_quantised(parameter) and not torch.isfinite(parameter).all():
            raise NumericalError(f"{name}: the base model holds NaN or Inf in this weight; load an intact checkpoint")


def _check_fit(model: nn.Module, sequences: Sequence[SafetySequence]) -> None:
    longest = max(len(sequence.input_ids) for sequence in sequences)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and longest > positions:
        raise DataError(
            f"safety data: the longest sequence has {longest} tokens, the model takes {positions}; "
            f"pass max_length={positions} or shorten it"
        )
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    largest = max(max(sequence.input_ids) for sequence in sequences)
    embedding = unwrapped(embedding) if isinstance(embedding, nn.Module) else None
    if isinstance(embedding, nn.Embedding) and largest >= embedding.num_embeddings:
        raise DataError(
            f"safety data: token id {largest} lies outside the model's {embedding.num_embeddings} embeddings; "
            "the tokenizer does not belong to this model"
        )


def _uncovered(reasons: Mapping[str, str], uses: Sequence[Use]) -> dict[str, str]:
    covered = {use.parameter for use in uses}
    return {name: reason for name, reason in reasons.items() if name not in covered}
