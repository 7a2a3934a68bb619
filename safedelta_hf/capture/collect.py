"""A safety profile of a model, made in one pass over the data, or in parts that a killed run need not read again."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from safedelta_hf.capture.collector import in_order
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.reading import capture_profile
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.batches import batches_of_equal_length, require_same
from safedelta_hf.data.dataset import (
    SafetySequence,
    Source,
    digest_of,
    read_safety_data,
    responses_of,
    tokenizer_digest,
)
from safedelta_hf.data.phrases import SAFETY_DATA, warn_unless_refusals
from safedelta_hf.data.refusals import HeldOut, is_language_model, require_likelihoods, split, topics
from safedelta_hf.data.templates import ProcessingClass, require_processing_class
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError, ProfileError, require_kind
from safedelta_hf.evaluation.sorting import sort_task
from safedelta_hf.modules.names import class_name, hub_name
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.profile.moments import SummedMoments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.weights.digest import fingerprint

DEFAULT_HOLDOUT = 0.25

FEWEST_HELD_OUT_OF = 16
"""Examples of which some are held out by default; fewer say little."""


@dataclass(frozen=True)
class Checkpointing:
    """Data is read in parts, and what is summed is kept after each, so that a killed run need not read it again.

    Attributes:
        folder: Where the sum of the parts read so far is kept, as a profile; a run that is made from the same goes on
            from there.
        every: Forward passes in each part.

    Raises:
        ConfigurationError: That is no number of passes.
    """

    folder: str | Path
    every: int

    def __post_init__(self) -> None:
        require_kind("Checkpointing", "folder", self.folder, (str, Path), "a folder")
        if type(self.every) is not int or self.every < 1:
            raise ConfigurationError(f"every={self.every!r} must be a whole number of forward passes of at least 1")

    def collect(
        self,
        sequences: Sequence[SafetySequence],
        config: ProfileConfig,
        read: Callable[[Sequence[SafetySequence]], SafetyProfile],
        made_of: Mapping[str, Any],
    ) -> SafetyProfile:
        """Read the parts that are not summed yet.

        Each part is summed on its own and added to the sum of those before it, so a run that was killed ends with the
        same moments as one that was not, bit for bit. Those of a single pass differ by rounding.

        Args:
            sequences: Tokenised safety data.
            config: How they are read.
            read: Makes one pass over some sequences.
            made_of: Fields of the profile's header that say what the moments are made of, beside the data.

        Returns:
            The sum, with its moments on disk in the folder.

        Raises:
            CaptureError: Layers shared their inputs in one part and not in another.
        """
        batches = list(batches_of_equal_length(sequences, config.batch_size))
        parts = [
            list(itertools.chain.from_iterable(batches[start : start + self.every]))
            for start in range(0, len(batches), self.every)
        ]
        chosen = [repr(config.targets), repr(config.layers_to_transform), repr(config.layers_pattern)]
        how = [config.batch_size, config.share_moments, chosen, self.every]
        given = json.dumps([digest_of(sequences), how, made_of], sort_keys=True)
        identity = hashlib.sha256(given.encode()).hexdigest()[:16]
        done, total = self._found(identity, len(parts))
        for number in progress_bar(
            range(done + 1, len(parts) + 1), desc="Parts", unit="part", initial=done, total=len(parts)
        ):
            found = read(parts[number - 1])
            folder = Path(self.folder) / f"{identity}-{number:05d}"
            (found if total is None else _added(total, found)).save(folder, "float32")
            total = SafetyProfile.load(folder)
            shutil.rmtree(Path(self.folder) / f"{identity}-{number - 1:05d}", ignore_errors=True)
        assert total is not None, "there are sequences, so there are parts"
        return replace(total, header=replace(total.header, data=digest_of(sequences)))

    def _found(self, identity: str, parts: int) -> tuple[int, SafetyProfile | None]:
        for number in range(parts, 0, -1):
            folder = Path(self.folder) / f"{identity}-{number:05d}"
            if not folder.exists():
                continue
            try:
                total = SafetyProfile.load(folder)
                for key in total.moments:
                    total.moments[key]  # reading checks
            except ProfileError:
                shutil.rmtree(folder)  # damaged since it was written
                continue
            return number, total
        return 0, None


def collect_profile(
    model: nn.Module | ShardedModel,
    safety_dataset: Source,
    processing_class: ProcessingClass | None = None,
    *,
    config: ProfileConfig | None = None,
    checkpointing: Checkpointing | None = None,
    purpose: str = SAFETY_DATA,
    sorted_by: Source | SafetyProfile | None = None,
    digests: Mapping[str, str] | None = None,
    progress: bool = True,
) -> SafetyProfile:
    """Let the base model read the safety data, and keep the second moments of every layer's inputs.

    In a run of several processes all of them call this together, with the same data: each reads its part, and each
    moment ends on one of them. `SafetyProfile.save`, also called by all, writes them to one folder.

    Args:
        model: The base (aligned) model, opened or not; it is left as it was. Adapters on it are disabled meanwhile.
        safety_dataset: Harmful prompts with the responses of a safe model: a Dataset, a list of dicts, a file, or a
            data set of the Hub, as `read_safety_data` takes them.
        processing_class: Tokenizer or processor; not needed for tokenised data.
        config: How the data is read, and of which weights; `ProfileConfig()` if None.
        checkpointing: Keep what is summed in a folder every so many batches, so that a killed run goes on there: the
            same call goes on where it stopped. The moments are read from that folder until it is removed. For one
            process.
        purpose: What errors and the progress bar call the data: profiles of task data and of ordinary data are made in
            the same way. Of safety data a warning tells where its responses hardly are refusals of this model.
        sorted_by: Of task data: the safety data, or a profile of it, or its folder, with some held out. Examples that
            the base would refuse, as it refuses there, are left out; what was found is in the profile's
            `header.sorting`. None takes all examples.
        digests: Digest of each of the model's parameters, if they are known already; else all weights are read once.
        progress: Whether to show a progress bar, on the main process.

    Returns:
        The profile, with its moments in host memory or mapped from the offload folder.

    Raises:
        ConfigurationError: A setting is outside its range.
        DataError: The safety data is empty, has no responses, or does not fit the model.
        NothingLeftError: The base would refuse all that was to be sorted.
        CaptureError: The model has no linear layer, or gives no likelihoods and data is to be held out for them.
        NumericalError: Weights or activations hold NaN or Inf.
        RankError: Another process failed.
    """
    owner = "collect_profile"
    require_kind(owner, "model", model, (nn.Module, ShardedModel), "a model")
    require_kind(owner, "config", config, (ProfileConfig, type(None)), "a ProfileConfig")
    require_kind(owner, "checkpointing", checkpointing, (Checkpointing, type(None)), "a Checkpointing")
    require_processing_class(owner, processing_class)
    config = config or ProfileConfig()
    opened = open_model(model)
    ranks = opened.ranks
    if checkpointing is not None and ranks.size > 1:
        raise ConfigurationError(
            f"checkpointing: for one process, and this run has {ranks.size}; leave it out here, or collect in one "
            "process"
        )
    with ranks.together():
        if config.holdout:
            require_likelihoods(opened.model)
        sequences = read_safety_data(safety_dataset, processing_class, config.max_length, purpose=purpose)
        sorting = None
        if sorted_by is not None:
            refusals = _refusals(sorted_by, processing_class, config)
            require_same([*sequences, *refusals], ranks, purpose)
            sequences, sorting = sort_task(
                opened, sequences, refusals, processing_class, batch_size=config.batch_size, progress=progress
            )
        sequences, aside = _split(opened.model, sequences, config.holdout, purpose)
        require_same(sequences + aside, ranks, purpose)
        made_of = {
            "architecture": class_name(opened.model),
            "base": dict(digests) if digests is not None else fingerprint(opened),
            "dtypes": opened.data_types,
            "tokenizer": tokenizer_digest(processing_class),
        }

        def read(some: Sequence[SafetySequence]) -> SafetyProfile:
            return capture_profile(opened, some, config, made_of, purpose=purpose, progress=progress)

        profile = read(sequences) if checkpointing is None else checkpointing.collect(sequences, config, read, made_of)
        held_out = HeldOut.measured(opened, aside, config.batch_size, progress=progress) if aside else None
        if purpose == SAFETY_DATA and ranks.is_main:
            losses = () if held_out is None else held_out.losses
            warn_unless_refusals(responses_of(sequences + aside, processing_class), losses)
        header = replace(_named(profile.header, opened), sorting=sorting)
        return replace(profile, header=header, held_out=held_out)


def _refusals(
    sorted_by: Source | SafetyProfile,
    processing_class: ProcessingClass | None,
    config: ProfileConfig,
) -> Sequence[SafetySequence]:
    if isinstance(sorted_by, str | Path) and Path(sorted_by).is_dir():
        sorted_by = SafetyProfile.load(sorted_by)
    if not isinstance(sorted_by, SafetyProfile):
        return read_safety_data(sorted_by, processing_class, config.max_length)
    if sorted_by.held_out is None:
        raise ConfigurationError(
            "sorted_by: this profile holds no refusals out, so nothing tells how the base refuses; give the safety "
            "data, or collect the profile with ProfileConfig(holdout=0.25), or leave the task unsorted"
        )
    return sorted_by.held_out.sequences


def _named(header: ProfileHeader, model: ShardedModel) -> ProfileHeader:
    name, revision = hub_name(model.model)
    packed = tuple(one for one in model.names if is_quantised(model.live(one)))
    return replace(header, name=name, revision=revision, packed=packed)


def _split(
    model: nn.Module, sequences: Sequence[SafetySequence], holdout: float | None, purpose: str
) -> tuple[list[SafetySequence], list[SafetySequence]]:
    # What is read, and what is held out; without a wish some is where a model can be measured and there is enough.
    if holdout is None:
        holds_out = is_language_model(model) and len(sequences) >= FEWEST_HELD_OUT_OF
        return split(sequences, DEFAULT_HOLDOUT if holds_out else 0.0)
    used, aside = split(sequences, holdout)
    if holdout and not aside:
        raise DataError(
            f"{purpose}: holdout={holdout} sets none of {len(used)} examples aside: their prompts are about "
            f"{topics(used)} different things (each has its rarest token), and what is held out has to be about others "
            "than what is not; give prompts about more things, or ProfileConfig(holdout=0) and a strength that is a "
            "number"
        )
    return used, aside


def _added(one: SafetyProfile, other: SafetyProfile) -> SafetyProfile:
    _require_same_sharing(one, other)
    new = [use for use in other.uses if one.key_of(use) is None]
    uses = in_order((*one.uses, *new), tuple(one.header.base))
    header = replace(
        one.header,
        data=other.header.data,
        sequences=one.header.sequences + other.header.sequences,
        tokens=one.header.tokens + other.header.tokens,
        skipped={name: why for name, why in one.header.skipped.items() if name in other.header.skipped},
        parametrised={**one.header.parametrised, **other.header.parametrised},
    )
    twins = dict(zip(other.moments, other.moments, strict=True))
    moments = SummedMoments(one.moments, other.moments, twins, partial(_joined, header.sequences))
    return SafetyProfile(header=header, uses=tuple(uses), moments=moments)


def _joined(sequences: int, one: InputMoment | None, other: InputMoment | None) -> InputMoment:
    found = [moment for moment in (one, other) if moment is not None]
    return replace(found[0] if len(found) == 1 else found[0].merge(found[1]), sequences=sequences)


def _require_same_sharing(one: SafetyProfile, other: SafetyProfile) -> None:
    # A use that only one of them knows must have a moment that only that one knows.
    for here, there in ((one, other), (other, one)):
        for use in here.uses:
            twin = there.key_of(use)
            if twin != use.moment and (twin is not None or use.moment in there.moments):
                raise CaptureError(
                    f"{use.parameter}: it shares its inputs with other layers in some parts of the data and not in "
                    "others; pass ProfileConfig(share_moments=False)"
                )
