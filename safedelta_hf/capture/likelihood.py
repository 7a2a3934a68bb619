"""How likely a model finds given responses: negative log-likelihood in nats per token.

Symbols: `labels_bt` are the tokens to predict, [batch, tokens]; `logits_bv` the predictions of those that count.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from safedelta_hf.capture.forward import arguments_of, input_device, require_fit
from safedelta_hf.capture.safety_data import IGNORED, SafetySequence
from safedelta_hf.capture.shares import forward_guard, share_of
from safedelta_hf.capture.undisturbed import undisturbed
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError, NumericalError
from safedelta_hf.ranks import Ranks
from safedelta_hf.sharding.holding import Holding
from safedelta_hf.sharding.whole import WholeParameters


def response_losses(
    model: nn.Module,
    sequences: Sequence[SafetySequence],
    *,
    batch_size: int = 8,
    progress: bool = False,
    desc: str = "Likelihood",
    ranks: Ranks | None = None,
    holding: Holding | None = None,
) -> list[tuple[float, ...]]:
    """Negative log-likelihood of every response token, given all tokens before it.

    Args:
        model: A causal language model, on any device.
        sequences: Tokenised examples.
        batch_size: Sequences per forward pass, at most.
        progress: Whether to show a progress bar.
        desc: What the progress bar says.
        ranks: Ranks that share the work and all get the result; None for this process alone.
        holding: How they hold the model's parameters; None where each holds all of them.

    Returns:
        For each sequence, in their order, the losses of its response tokens in nats. The first token of a sequence
        has nothing before it, and no loss.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        DataError: A sequence is longer than the model takes, or no response token of it has one before it.
        CaptureError: The model returns no logits.
        NumericalError: A loss is NaN or Inf.
        RankError: Another rank failed.
    """  # noqa: DOC502 - raised by the functions called
    ranks, holding = ranks or Ranks(), holding or WholeParameters(model)
    with ranks.together():
        if batch_size < 1:
            raise ConfigurationError(f"batch_size: must be at least 1, got {batch_size}")
        for number, sequence in enumerate(sequences):
            if all(label == IGNORED for label in sequence.labels[1:]):
                raise DataError(f"row {number}: no response token has a token before it, so it has no likelihood")
        # A data-parallel wrapper would exchange buffers, which ranks without a sequence take no part in.
        model = model.module if isinstance(model, DistributedDataParallel) else model
        require_fit(model, [sequence.input_ids for sequence in sequences], "sequences")
        # Equal sequences have equal losses, and are computed once.
        share = share_of(list(dict.fromkeys(sequences)), batch_size, ranks, collective=holding.collective)
        found: dict[SafetySequence, tuple[float, ...]] = {}
        ranks.check_in()  # in a collective forward pass no rank could hear of another that has failed before
        with undisturbed(model):
            for batch, counts in tqdm(share, desc=desc, unit="batch", disable=not (progress and ranks.is_main)):
                with forward_guard(ranks, holding):
                    losses = _batch_losses(model, batch)
                if counts:
                    found.update(zip(batch, losses, strict=True))
        everyone = {sequence: tokens for part in ranks.gather(found) for sequence, tokens in part.items()}
    return _in_order(sequences, everyone)


def _in_order(
    sequences: Sequence[SafetySequence], found: Mapping[SafetySequence, tuple[float, ...]]
) -> list[tuple[float, ...]]:
    losses = [found[sequence] for sequence in sequences]
    for number, tokens in enumerate(losses):
        if not all(map(_finite, tokens)):
            raise NumericalError(f"row {number}: the loss of the model is NaN or Inf; are its weights intact?")
    return losses


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _batch_losses(model: nn.Module, batch: Sequence[SafetySequence]) -> list[tuple[float, ...]]:
    labels_bt = torch.tensor([sequence.labels[1:] for sequence in batch], device=input_device(model))
    counts = labels_bt != IGNORED
    output = model(**arguments_of(model, batch))
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"{type(model).__name__} returns no logits to tell likelihoods by")
    logits_bv = logits[:, :-1][counts]
    # Half precision would round the losses; what is finer than float32 stays as it is.
    logits_bv = logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits_bv, labels_bt[counts].to(logits_bv.device), reduction="none")
    return [tuple(one.tolist()) for one in torch.split(losses.cpu(), counts.sum(1).tolist())]
