"""One pass of the base model over the safety data."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.config import Targets
from safedelta_hf.capture.observer import Observer, every_product_visible
from safedelta_hf.capture.uses import ObservedUses, merged
from safedelta_hf.capture.watched_model import WatchedModel, computed_weights, packed_products
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.batches import Share, arguments_of, forward_guard, input_device, require_fit, share_of
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.refusals import HeldOut
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import CaptureError, ConfigurationError
from safedelta_hf.modules.evaluating import evaluating, without_adapters
from safedelta_hf.modules.names import class_name
from safedelta_hf.profile.moments import Moments, ShardedMoments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.profile.storage import MomentStorage
from safedelta_hf.records import ProfileHeader, Use


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What one pass over the safety data found.

    Attributes:
        uses: How each covered parameter is used.
        moments: Moments by key, in host memory; in a run of several processes each on its owner.
        skipped: Reason by parameter name for those that cannot be covered.
        parametrised: Names of the parameters that a weight is computed from, by its canonical name.
        storage: What holds the moments; their files, if any, live as long.
    """

    uses: tuple[Use, ...]
    moments: Moments
    skipped: Mapping[str, str]
    parametrised: Mapping[str, tuple[str, ...]]
    storage: MomentStorage

    def profile(self, held_out: HeldOut | None = None, **header: Any) -> SafetyProfile:  # noqa: ANN401
        """Join what was found with what it was made from.

        Args:
            held_out: Safety data that was not in that pass.
            **header: Fields of `ProfileHeader`, but for `skipped` and `parametrised`.

        Returns:
            The profile, in memory.
        """
        return SafetyProfile(
            header=ProfileHeader(skipped=dict(self.skipped), parametrised=dict(self.parametrised), **header),
            uses=self.uses,
            moments=self.moments,
            held_out=held_out,
            storage=self.storage,
        )


def capture_moments(
    model: ShardedModel,
    sequences: Sequence[SafetySequence],
    *,
    storage: MomentStorage,
    batch_size: int = 8,
    share_moments: bool = True,
    purpose: str = "safety data",
    targets: Targets | None = None,
    progress: bool = True,
) -> Capture:
    """Read the safety data once and sum the moments of every layer.

    Sequences are batched with others of exactly their length, so no padding ever enters a moment, whatever shapes a
    model's layers see. The model is left as it was, also after an exception.

    In a run of several processes all of them call this, with the same data. Each reads its part, and then each moment
    is summed up on one of them.

    Args:
        model: The base model, on any device; its ranks share the work.
        sequences: Tokenised safety data.
        storage: Where the moments are held while they are summed.
        batch_size: Sequences per forward pass, at most.
        share_moments: Whether layers that read the same tensor share one moment.
        purpose: What errors and the progress bar call the data.
        targets: Which linear weights are read; all of them if None.
        progress: Whether to show a progress bar, on the main rank.

    Returns:
        The moments, and what could not be covered.

    Raises:
        CaptureError: The model has no linear layer, or none was reached, or it is an encoder-decoder model.
        ConfigurationError: The targets choose none of its linear weights, or it is sharded and has weights that are
            computed from parameters.
        RankError: Another rank failed.
    """  # noqa: DOC502 - raised by the functions called
    ranks = model.ranks
    with ranks.together():
        watched = WatchedModel.of(model, targets or Targets())
        require_fit(watched.module, [sequence.input_ids for sequence in sequences], purpose)
        share = share_of(sequences, batch_size, model)
        reading = _Reading(watched, share, f"Reading {purpose}" if progress and ranks.is_main else None)
        observed, sums = reading.read(storage, share_moments=share_moments)
        if observed.unshared and ranks.size > 1:
            # Whether products always read the same tensor cannot be told from a part of the data.
            sums.clear()
            storage = storage.anew()
            observed, sums = reading.read(storage, share_moments=False)
        if observed.unshared:
            raise CaptureError(f"{observed.unshared}; pass share_moments=False")
        uses = observed.covered(tuple(watched.matrices), watched.chosen)
        untargeted = observed.untargeted(watched.chosen)
        _require_products(watched.module, uses, untargeted, watched.targets)
        unchosen = dict.fromkeys(untargeted, f"it is not among the targets ({watched.targets.names!r})")
        used = {use.parameter for use in uses}
        return Capture(
            uses=tuple(uses),
            moments=reading.moments(observed, frozenset(use.moment for use in uses), sums, storage, len(sequences)),
            skipped=watched.reasons(used, {**observed.unsupported, **unchosen}),
            parametrised={name: own.originals for name, own in watched.weights.followed.items() if name in used},
            storage=storage,
        )


@dataclass(frozen=True)
class _Reading:
    """Lets a model read this rank's share of the data.

    Attributes:
        watched: The model.
        share: The data.
        title: What the progress bar says; None for none.
    """

    watched: WatchedModel
    share: Share
    title: str | None

    def read(self, storage: MomentStorage, *, share_moments: bool) -> tuple[ObservedUses, dict[str, Tensor]]:
        """Let the model read.

        Args:
            storage: Where this rank holds its moments.
            share_moments: Whether layers that read the same tensor share one.

        Returns:
            What all ranks observed, and the moments of this rank's share by key.
        """
        watched = self.watched
        collector = MomentCollector(
            watched.matrices,
            storage,
            head=watched.head,
            chosen=watched.chosen,
            share=share_moments,
        )
        observer = Observer(collector, watched.matrices)
        computed = watched.weights.followed.values()
        with (
            without_adapters(watched.module),
            evaluating(watched.module),
            every_product_visible(watched.module),
            watched.model.tracked_by(observer),
            packed_products(watched.module, observer),
            computed_weights(computed, observer),
        ):
            self._run(observer, collector)
        return merged(watched.model.ranks.gather(collector.observed(observer.unsupported))), collector.take()

    def _run(self, observer: Observer, collector: MomentCollector) -> None:
        module, model = self.watched.module, self.watched.model
        model.ranks.check_in()  # in a collective forward pass no rank could hear of another that has failed before
        for batch, counts in tqdm(self.share, desc=self.title, unit="batch", disable=self.title is None):
            with forward_guard(model):
                arguments = arguments_of(module, batch)
                given = [value for value in arguments.values() if isinstance(value, Tensor)]
                observer.start_batch(len(batch), len(batch[0].input_ids), given)
                with observer if counts else nullcontext():
                    module(**arguments)
            if collector.shared is not None and collector.shared.is_void and not model.collective:
                return

    def moments(
        self,
        observed: ObservedUses,
        wanted: frozenset[str],
        sums: dict[str, Tensor],
        storage: MomentStorage,
        sequences: int,
    ) -> Moments:
        """Add up the moments of all ranks, each on its owner.

        Args:
            observed: What all ranks observed.
            wanted: Keys of the moments that are needed.
            sums: The moments of this rank by key; each is taken out when it is exchanged.
            storage: Where this rank holds its moments.
            sequences: Number of sequences that were read, over all ranks.

        Returns:
            The moments in host memory, mapped or not; of a single process all of them.
        """
        ranks, owners = self.watched.model.ranks, dict[str, int]()
        held: dict[str, InputMoment] = {}
        loads = [0] * ranks.size
        for key in observed.uses:
            own = sums.pop(key, None)
            if key not in wanted:
                continue
            owner = loads.index(min(loads))
            loads[owner] += math.prod(observed.shapes[key])
            owners[key] = owner
            total = self._summed(own, observed.shapes[key], owner, storage)
            if total is not None:
                held[key] = InputMoment(total=total, sequences=sequences, tokens=observed.tokens[key])
        shapes = {key: observed.shapes[key] for key in owners}
        return Moments(held) if ranks.size == 1 else ShardedMoments(shapes, owners, held, ranks)

    def _summed(self, own: Tensor | None, shape: tuple[int, ...], owner: int, storage: MomentStorage) -> Tensor | None:
        ranks, device = self.watched.model.ranks, input_device(self.watched.module)  # of the same type on all ranks
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
        return own.cpu()


def _require_products(model: nn.Module, uses: Sequence[Use], untargeted: Collection[str], targets: Targets) -> None:
    kind = class_name(model)
    if not uses:
        raise CaptureError(f"{kind}: the safety data reached no weight; is forward() the right entry?")
    if untargeted and all(use.role.is_diagonal for use in uses):
        raise ConfigurationError(
            f"targets={targets.names!r}, layers_to_transform={targets.layers_to_transform!r} choose none of the "
            f"{len(untargeted)} linear weights of {kind}, such as {min(untargeted)}"
        )
    if all(use.role.is_diagonal for use in uses):
        raise CaptureError(f"{kind} has no linear layer that the safety data reaches, so nothing to adjust")
