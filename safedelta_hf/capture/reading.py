"""One pass of the base model over the safety data."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.capture.collector import MomentCollector, ObservedUses, merged
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.observer import Observer, every_product_visible
from safedelta_hf.capture.watched_model import WatchedModel, computed_weights, packed_products
from safedelta_hf.core.low_rank import LowRank, Matrix
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.batches import Batch, arguments_of, forward_guard, input_device, require_fit, share_of
from safedelta_hf.data.dataset import SafetySequence, digest_of
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import CaptureError, ConfigurationError
from safedelta_hf.modules.evaluating import evaluating, without_adapters
from safedelta_hf.modules.names import class_name
from safedelta_hf.profile.moments import Moments, MomentStorage, ShardedMoments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import Use
from safedelta_hf.report.progress import progress_bar


def capture_profile(
    model: ShardedModel,
    sequences: Sequence[SafetySequence],
    config: ProfileConfig,
    made_of: Mapping[str, Any],
    *,
    purpose: str = "safety data",
    progress: bool = True,
) -> SafetyProfile:
    """Read the safety data once and sum the moments of every layer.

    Sequences are batched with others of exactly their length, so no padding ever enters a moment, whatever shapes a
    model's layers see. The model is left as it was, also after an exception.

    In a run of several processes all of them call this, with the same data. Each reads its share, and then each moment
    is summed up on one of them.

    Args:
        model: The base model, on any device; its ranks share the work.
        sequences: Tokenised safety data.
        config: How they are read, and of which weights.
        made_of: Fields of the profile's header that say what the moments are made of, beside the data.
        purpose: What errors and the progress bar call the data.
        progress: Whether to show a progress bar, on the main rank.

    Returns:
        The profile, with its moments in host memory or mapped; in a run of several processes each on its owner.

    Raises:
        CaptureError: The model has no linear layer, or none was reached, or it is an encoder-decoder model.
        ConfigurationError: The targets choose none of its linear weights, or it is sharded and has weights that are
            computed from parameters.
        RankError: Another rank failed.
    """
    ranks = model.ranks
    with ranks.together():
        storage = MomentStorage(config.budget, config.offload_folder)
        watched = WatchedModel.of(model, config)
        require_fit(watched.module, [sequence.input_ids for sequence in sequences], purpose)
        batches = share_of(sequences, config.batch_size, model)
        title = f"Reading {purpose}" if progress and ranks.is_main else None
        observed, sums = _observed(watched, batches, title, storage, share_moments=config.share_moments)
        if observed.unshared and ranks.size > 1:
            # Whether products always read the same tensor cannot be told from a share of the data.
            sums.clear()
            storage = MomentStorage(config.budget, config.offload_folder)
            observed, sums = _observed(watched, batches, title, storage, share_moments=False)
        if observed.unshared:
            raise CaptureError(f"{observed.unshared}; pass ProfileConfig(share_moments=False)")
        uses = observed.covered(tuple(watched.matrices), watched.chosen)
        untargeted = observed.untargeted(watched.chosen)
        _require_products(watched.module, uses, untargeted, config)
        unchosen = dict.fromkeys(untargeted, f"it is not among the targets ({config.targets!r})")
        used = {use.parameter for use in uses}
        header = ProfileHeader(
            data=digest_of(sequences),
            sequences=len(sequences),
            tokens=sum(len(sequence.input_ids) for sequence in sequences),
            skipped=watched.reasons(used, {**observed.unsupported, **unchosen}),
            parametrised={name: weight.originals for name, weight in watched.computed.items() if name in used},
            **made_of,
        )
        wanted = {use.moment for use in uses}
        moments = _summed_over_ranks(watched, observed, wanted, sums, storage, len(sequences))
        return SafetyProfile(header=header, uses=tuple(uses), moments=moments, storage=storage)


def _observed(
    watched: WatchedModel,
    batches: Sequence[tuple[Batch, bool]],
    title: str | None,
    storage: MomentStorage,
    *,
    share_moments: bool,
) -> tuple[ObservedUses, dict[str, Matrix]]:
    # What all ranks observed, and the moments of this rank's share of the data by key.
    collector = MomentCollector(
        watched.matrices,
        storage,
        head=watched.head,
        chosen=watched.chosen,
        share=share_moments,
        keep_few=watched.model.ranks.size == 1,  # sums are exchanged as matrices
    )
    observer = Observer(collector, watched.matrices)
    with (
        without_adapters(watched.module),
        evaluating(watched.module),
        every_product_visible(watched.module),
        watched.model.tracked_by(observer),
        packed_products(watched.module, observer),
        computed_weights(watched.computed.values(), observer),
    ):
        _read(watched, batches, title, observer, collector)
    return merged(watched.model.ranks.gather(collector.observed(observer.unsupported))), collector.take()


def _read(
    watched: WatchedModel,
    batches: Sequence[tuple[Batch, bool]],
    title: str | None,
    observer: Observer,
    collector: MomentCollector,
) -> None:
    module, model = watched.module, watched.model
    model.ranks.check_in()  # in a collective forward pass no rank could hear of another that has failed before
    for batch, counts in progress_bar(batches, desc=title, unit="batch", disable=title is None):
        with forward_guard(model):
            arguments = arguments_of(module, batch)
            given = [value for value in arguments.values() if isinstance(value, Tensor)]
            observer.start_batch(len(batch), len(batch[0].input_ids), given)
            with observer if counts else nullcontext():
                module(**arguments)
        if collector.shared is not None and collector.shared.is_void and not model.collective:
            return


def _summed_over_ranks(
    watched: WatchedModel,
    observed: ObservedUses,
    wanted: Collection[str],
    sums: dict[str, Matrix],
    storage: MomentStorage,
    sequences: int,
) -> Moments:
    # Each moment of this rank is taken out of the sums when it is exchanged, so that its memory is freed.
    ranks, owners = watched.model.ranks, dict[str, int]()
    own_moments: dict[str, InputMoment] = {}
    loads = [0] * ranks.size
    device = input_device(watched.module)  # of the same type on all ranks
    for key in observed.uses:
        own = sums.pop(key, None)
        if key not in wanted:
            continue
        owner = loads.index(min(loads))
        loads[owner] += math.prod(observed.shapes[key])
        owners[key] = owner
        total = _sum_on_owner(ranks, device, own, observed.shapes[key], owner, storage)
        if total is not None:
            own_moments[key] = InputMoment(total=total, sequences=sequences, tokens=observed.tokens[key])
    shapes = {key: observed.shapes[key] for key in owners}
    return Moments(own_moments) if ranks.size == 1 else ShardedMoments(shapes, owners, own_moments, ranks)


def _sum_on_owner(
    ranks: Ranks,
    device: torch.device,
    own: Matrix | None,
    shape: tuple[int, ...],
    owner: int,
    storage: MomentStorage,
) -> Matrix | None:
    if isinstance(own, LowRank):
        return own.to(torch.device("cpu"))
    is_owner = owner == ranks.rank
    if own is None and is_owner:
        own = storage.allocate(shape, device)
    # Another rank may have it in host memory, where this one has it on its device.
    moved = torch.zeros(shape, device=device) if own is None else own
    if ranks.size > 1:
        moved = moved.to(device)
        ranks.sum_to_(moved, owner)
    if own is None or not is_owner:
        return None
    if moved is not own:
        own.copy_(moved)
    return storage.settled(own)


def _require_products(
    model: nn.Module, uses: Sequence[Use], untargeted: Collection[str], config: ProfileConfig
) -> None:
    kind = class_name(model)
    if not uses:
        raise CaptureError(f"{kind}: the safety data reached no weight; is forward() the right entry?")
    if untargeted and all(use.role.is_diagonal for use in uses):
        raise ConfigurationError(
            f"targets={config.targets!r}, layers_to_transform={config.layers_to_transform!r} choose none of the "
            f"{len(untargeted)} linear weights of {kind}, such as {min(untargeted)}"
        )
    if all(use.role.is_diagonal for use in uses):
        raise CaptureError(f"{kind} has no linear layer that the safety data reaches, so nothing to adjust")
