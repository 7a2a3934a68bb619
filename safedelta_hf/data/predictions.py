"""What a model predicts of the responses of rows, all ranks sharing the work."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from safedelta_hf.data.batches import Batch, arguments_of, forward_guard, input_device, require_fit, share_of
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError
from safedelta_hf.modules.evaluating import evaluating
from safedelta_hf.report.progress import progress_bar

R = TypeVar("R")


def read_predictions(
    model: ShardedModel,
    sequences: Sequence[SafetySequence],
    read: Callable[[Tensor, Batch], Sequence[R]],
    *,
    batch_size: int = 8,
    desc: str | None = None,
    bar: Any = None,  # noqa: ANN401 - of tqdm
) -> list[R]:
    """Read from a model's predictions of every response token, given all tokens before it.

    Args:
        model: A causal language model; its ranks share the work, and all get the result.
        sequences: Tokenised examples.
        read: Given logits [response tokens of a batch, vocabulary], one sequence after the other, and the batch; gives
            a plain value for each of its sequences.
        batch_size: Sequences per forward pass, at most.
        desc: What a progress bar says, on the main process; None shows none.
        bar: A bar of a larger work, to be moved by every sequence that this process reads; None for none.

    Returns:
        One value for each sequence, in their order. The first token of a sequence has nothing before it, and no
        prediction.

    Raises:
        ConfigurationError: `batch_size` is below 1.
        DataError: A sequence is longer than the model takes, or no response token of it has one before it.
        CaptureError: The model does not return the logits of each next token.
        RankError: Another rank failed.
    """
    ranks, runnable = model.ranks, model.runnable
    with ranks.together():
        if batch_size < 1:
            raise ConfigurationError(f"batch_size: must be at least 1, got {batch_size}")
        for number, sequence in enumerate(sequences):
            if all(label == IGNORED for label in sequence.labels[1:]):
                raise DataError(f"row {number}: no response token has a token before it, so it has no likelihood")
        require_fit(runnable, [sequence.input_ids for sequence in sequences], "sequences")
        # Equal sequences are read once.
        share = share_of(list(dict.fromkeys(sequences)), batch_size, model)
        found: dict[SafetySequence, R] = {}
        ranks.check_in()  # in a collective forward pass no rank could hear of another that has failed before
        with evaluating(runnable):
            for batch, counts in progress_bar(share, desc=desc, unit="batch", disable=not (desc and ranks.is_main)):
                with forward_guard(model):
                    values = read(_logits(runnable, batch), batch)
                if counts:
                    found.update(zip(batch, values, strict=True))
                    if bar is not None:
                        bar.update(len(batch))
        everyone = {sequence: value for own in ranks.gather(found) for sequence, value in own.items()}
    return [everyone[sequence] for sequence in sequences]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    labels = torch.tensor([sequence.labels for sequence in batch], device=input_device(model))
    return response_logits(model, model(**arguments_of(model, batch)), labels)


def response_logits(model: nn.Module, output: object, labels_bt: Tensor) -> Tensor:
    """What a model predicts of the response tokens of a batch.

    Args:
        model: The model, for errors.
        output: What it returned.
        labels_bt: Labels of the sequences, [sequences, tokens]; `IGNORED` outside of responses, padding included.

    Returns:
        Logits [response tokens, vocabulary], one sequence after the other; float32 or finer.

    Raises:
        CaptureError: The model does not return the logits of each next token.
    """
    logits = next_token_logits(model, output, labels_bt.shape, largest=int(labels_bt.max()))
    logits_nv = logits[:, :-1][labels_bt[:, 1:].to(logits.device) != IGNORED]
    # Half precision would round the losses; what is finer than float32 stays as it is.
    return logits_nv.to(torch.promote_types(logits_nv.dtype, torch.float32))


def next_token_logits(model: nn.Module, output: object, shape: Sequence[int], *, largest: int) -> Tensor:
    """What a model predicts after each token of a batch.

    Args:
        model: The model, for errors.
        output: What it returned.
        shape: Sequences and tokens that it was given.
        largest: The largest token that will be looked up.

    Returns:
        Logits [sequences, tokens, vocabulary], in the model's own data type.

    Raises:
        CaptureError: The model does not return them.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise CaptureError(f"{type(model).__name__} returns no logits to tell likelihoods by")
    if logits.ndim != 3 or logits.shape[:2] != tuple(shape) or logits.shape[2] <= largest:
        raise CaptureError(
            f"{type(model).__name__} returns logits {list(logits.shape)} for input ids {list(shape)}, which are not "
            "those of each next token, so likelihoods cannot be told by them; give the strength as a number"
        )
    return logits
