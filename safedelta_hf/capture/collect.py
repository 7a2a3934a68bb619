"""A safety profile of a model in memory."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from safedelta_hf.capture.config import ALL_LINEAR, CaptureSettings
from safedelta_hf.capture.reading import Capture, capture_moments
from safedelta_hf.capture.resume import Parts
from safedelta_hf.data.dataset import (
    ProcessingClass,
    SafetySequence,
    digest_of,
    read_safety_data,
    tokenizer_digest,
)
from safedelta_hf.data.refusals import HeldOut, split
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.modules.names import class_name, unwrapped
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.profile.storage import MomentStorage
from safedelta_hf.weights.digest import fingerprint

DEFAULT_HOLDOUT = 0.25


def collect_profile(
    model: nn.Module | ShardedModel,
    safety_dataset: str | Path | Iterable[Mapping[str, Any]],
    processing_class: ProcessingClass | None = None,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    moment_memory: int | str | None = None,
    offload_folder: str | Path | None = None,
    share_moments: bool = True,
    holdout: float | None = None,
    purpose: str = "safety data",
    targets: str | Sequence[str] = ALL_LINEAR,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    digests: Mapping[str, str] | None = None,
    parts: Parts | None = None,
    progress: bool = True,
) -> SafetyProfile:
    """Let the base model read the safety data, and keep the second moments of every layer's inputs.

    In a run of several processes all of them call this together, with the same data: each reads its part, and each
    moment ends on one of them. `SafetyProfile.save`, also called by all, writes them to one folder.

    Args:
        model: The base (aligned) model, opened or not; it is left as it was. Adapters on it are disabled meanwhile.
        safety_dataset: Harmful prompts with the responses of a safe model: a Dataset, a list of dicts, or the path of
            a JSON-lines file, in any form that TRL takes.
        processing_class: Tokenizer or processor; not needed for tokenised data.
        batch_size: Safety sequences per forward pass, at most; batches hold sequences of one length and no padding.
        max_length: Safety sequences are cut to this many tokens.
        moment_memory: Bytes (or "8GB") of moments to hold on the device at a time; None for no limit.
        offload_folder: Where moments beyond that limit are memory-mapped; without it they go to host memory.
        share_moments: Whether layers that read the same tensor share one moment.
        holdout: Share of the safety data to keep out of the moments, in [0, 1): rules with `strength="auto"` measure
            refusals by it. None for a quarter, of at least 16 examples that a transformers model reads, else nothing.
        purpose: What errors and the progress bar call the data: profiles of task data and of ordinary data are made in
            the same way.
        targets: Which linear weights are profiled and adjusted: "all-linear"; names of modules or parameters as in
            PEFT, matched at their end; or a regular expression that matches whole names.
        layers_to_transform: Numbers of the layers to choose from, as in PEFT; None for all.
        layers_pattern: What comes before a layer's number in names, such as "layers", as in PEFT; None for anything.
        digests: Digest of each of the model's parameters, if they are known already; else all weights are read once.
        parts: Read the data in parts, and keep their sum in a folder, so that a killed run goes on there: the same
            call goes on where it stopped. The moments are read from that folder until it is removed. For one process.
        progress: Whether to show a progress bar, on the main process.

    Returns:
        The profile, with its moments in host memory or mapped from the offload folder.

    Raises:
        ConfigurationError: A setting is outside its range.
        DataError: The safety data is empty, has no responses, or does not fit the model.
        CaptureError: The model has no linear layer.
        NumericalError: Weights or activations hold NaN or Inf.
        RankError: Another process failed.
    """  # noqa: DOC502 - raised by the rooms below
    chosen = CaptureSettings(
        batch_size=batch_size,
        max_length=max_length,
        moment_memory=moment_memory,
        offload_folder=offload_folder,
        share_moments=share_moments,
        holdout=holdout,
        targets=targets,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
    )
    opened = open_model(model)
    ranks = opened.ranks
    if parts is not None and ranks.size > 1:
        raise ConfigurationError(
            f"parts: read by one process, and this run has {ranks.size}; leave them out here, or collect in one process"
        )
    with ranks.together():
        sequences = read_safety_data(safety_dataset, processing_class, chosen.max_length, purpose=purpose)
        sequences, aside = split(sequences, _share_held_out(opened.model, chosen.holdout, len(sequences)))
        if chosen.holdout and not aside:
            raise DataError(
                f"{purpose}: holdout={chosen.holdout} sets none of {len(sequences)} examples aside; give more, or "
                "holdout=0"
            )
        _require_same(sequences + aside, ranks, purpose)
        made_of = {
            "architecture": class_name(opened.model),
            "base": dict(digests) if digests is not None else fingerprint(opened),
            "dtypes": opened.data_types,
            "tokenizer": tokenizer_digest(processing_class),
        }

        def read(part: Sequence[SafetySequence]) -> Capture:
            return capture_moments(
                opened,
                part,
                storage=MomentStorage(chosen.budget, chosen.offload_folder),
                batch_size=chosen.batch_size,
                share_moments=chosen.share_moments,
                purpose=purpose,
                targets=chosen.chosen,
                progress=progress,
            )

        capture = read(sequences) if parts is None else parts.capture(sequences, chosen, read, made_of)
        held_out = HeldOut.measured(opened, aside, chosen.batch_size) if aside else None
        return capture.profile(
            held_out,
            **made_of,
            data=digest_of(sequences),
            sequences=len(sequences),
            tokens=sum(len(sequence.input_ids) for sequence in sequences),
        )


def _require_same(sequences: Sequence[SafetySequence], ranks: Ranks, purpose: str) -> None:
    if len(set(ranks.gather(digest_of(sequences)))) > 1:
        raise DataError(
            f"{purpose}: the processes of this run were given different examples; give all of them the whole data, in "
            "the same order, and each will read a part of it"
        )


def _share_held_out(model: nn.Module, asked: float | None, examples: int) -> float:
    if asked is not None:
        return asked
    # Fewer say little about an upper quantile, and a module of another kind may return no logits.
    return DEFAULT_HOLDOUT if isinstance(unwrapped(model), PreTrainedModel) and examples >= 16 else 0.0
