"""Moments of all ranks put together after a capture, each on one of them, and moved between them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from safedelta_hf.capture.findings import Findings, UseOf, common_keys, merged
from safedelta_hf.capture.moments import HeldMoments, Moments, MomentsByKey
from safedelta_hf.capture.owned import OwnedMoment, OwnedMoments
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.ranks import Ranks


def findings_of_all(own: Findings, ranks: Ranks) -> Findings:
    """What the ranks found together, each in its part of the data.

    Args:
        own: Of this rank.
        ranks: All of them.

    Returns:
        The same on all ranks: as if one of them had read all of the data.
    """
    everyone = ranks.gather(own)
    names = common_keys(everyone)
    return merged([found.renamed(names) for found in everyone])


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

    def moments(self, sums: dict[UseOf, Tensor], findings: Findings, wanted: frozenset[str]) -> Moments:
        """Bring each moment to its owner.

        Args:
            sums: The moments of this rank; each is taken out when it is exchanged.
            findings: Those of all ranks.
            wanted: Keys of the moments that are needed.

        Returns:
            The moments in host memory, mapped or not; of a single process all of them.
        """
        entries: dict[str, OwnedMoment] = {}
        held: dict[str, InputMoment] = {}
        loads = [0] * self.ranks.size
        for use, key in findings.keys.items():
            own = sums.pop(use, None)
            if key not in wanted:
                continue
            owner = loads.index(min(loads))
            loads[owner] += math.prod(findings.shapes[key])
            entries[key] = OwnedMoment(shape=findings.shapes[key], owner=owner)
            total = self._summed(own, findings.shapes[key], owner)
            if total is not None:
                held[key] = InputMoment(total=total, sequences=self.sequences, tokens=findings.tokens[key])
        return HeldMoments(held) if self.ranks.size == 1 else OwnedMoments(entries, held, self.ranks)

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


def moved(moments: OwnedMoments, wanted: Mapping[str, tuple[str, int]]) -> dict[str, InputMoment]:
    """Bring moments to other ranks; all ranks do it together.

    Args:
        moments: Moments by key.
        wanted: For each that is wanted, under a key of the caller's, its own key and the rank that is to have it.

    Returns:
        Those that this rank is to have, by the caller's keys.
    """
    ranks, held = moments.ranks, {}
    for name, (key, receiver) in wanted.items():
        moment = _brought(moments, key, receiver)
        if moment is not None and receiver == ranks.rank:
            held[name] = moment
    return held


class BroughtToMain(MomentsByKey):
    """Moments that are brought to the main rank when it asks for them, while the others follow.

    Args:
        moments: Moments by key, each on its owner.
    """

    def __init__(self, moments: OwnedMoments) -> None:
        super().__init__(moments)
        self._moments = moments

    def __getitem__(self, key: str) -> InputMoment:
        moment = _brought(self._moments, key, 0)
        assert moment is not None, "it was brought here"
        return moment

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment.

        Args:
            key: Its key.

        Returns:
            Its shape.
        """
        return self._moments.shape(key)

    def follow(self, keys: Iterable[str]) -> None:
        """Take part, on every other rank, in what the main one asks for.

        Args:
            keys: What that will be, in order.
        """
        for key in keys:
            _brought(self._moments, key, 0)


def _brought(moments: OwnedMoments, key: str, receiver: int) -> InputMoment | None:
    owner, ranks = moments.owner(key), moments.ranks
    moment = moments[key] if owner == ranks.rank else None
    return moment if owner == receiver else ranks.broadcast(moment, owner)
