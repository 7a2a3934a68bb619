"""Moments of all ranks put together after a capture, each on one of them, and moved between them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safedelta_hf.capture.uses import ObservedUses
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.profile.moments import Moments, ShardedMoments
from safedelta_hf.profile.storage import MomentStorage


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Adds up the moments of all ranks.

    Attributes:
        ranks: The ranks.
        storage: Where this rank holds its moments.
        device: Where moments are exchanged: a device of the same type on all ranks.
        sequences: Number of sequences that were read, over all ranks.
    """

    ranks: Ranks
    storage: MomentStorage
    device: torch.device
    sequences: int

    def moments(self, sums: dict[str, Tensor], observed: ObservedUses, wanted: frozenset[str]) -> Moments:
        """Bring each moment to its owner.

        Args:
            sums: The moments of this rank by key; each is taken out when it is exchanged.
            observed: Those of all ranks.
            wanted: Keys of the moments that are needed.

        Returns:
            The moments in host memory, mapped or not; of a single process all of them.
        """
        owners: dict[str, int] = {}
        held: dict[str, InputMoment] = {}
        loads = [0] * self.ranks.size
        for key in observed.uses:
            own = sums.pop(key, None)
            if key not in wanted:
                continue
            owner = loads.index(min(loads))
            loads[owner] += math.prod(observed.shapes[key])
            owners[key] = owner
            total = self._summed(own, observed.shapes[key], owner)
            if total is not None:
                held[key] = InputMoment(total=total, sequences=self.sequences, tokens=observed.tokens[key])
        shapes = {key: observed.shapes[key] for key in owners}
        return Moments(held) if self.ranks.size == 1 else ShardedMoments(shapes, owners, held, self.ranks)

    def _summed(self, own: Tensor | None, shape: tuple[int, ...], owner: int) -> Tensor | None:
        is_owner = owner == self.ranks.rank
        if own is None and is_owner:
            own = self.storage.allocate(shape, self.device)
        # Another rank may have it in host memory, where this one has it on its device.
        moved = torch.zeros(shape, device=self.device) if own is None else own
        if self.ranks.size > 1:
            moved = moved.to(self.device)
            self.ranks.sum_to_(moved, owner)
        if own is None or not is_owner:
            return None
        if moved is not own:
            own.copy_(moved)
        return own.cpu()
