"""Moments by key, wherever they are: in memory, on disk, summed as they are read, or on another rank."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import CaptureError


class Moments(Mapping[str, InputMoment]):
    """A mapping of keys to moments that knows the shape of each without reading it.

    Reading one may take memory of its size, a file or a network; `shape`, iteration and membership take none.
    """

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment, known without reading it.

        Args:
            key: Its key.

        Returns:
            `(in, in)`, or `(in,)` for the diagonal kind.

        Raises:
            KeyError: There is no such moment.
        """

    def identity(self) -> str:
        """What tells these moments from others.

        Returns:
            A digest of their values, each of which is read once.
        """
        result = hashlib.sha256()
        for key, moment in self.items():
            total = moment.total.detach().cpu().contiguous()
            told = [key, str(total.dtype), list(total.shape), moment.sequences, moment.tokens]
            result.update(json.dumps(told).encode())
            result.update(total.reshape(-1).view(torch.uint8).numpy().data)
        return result.hexdigest()


class MomentsByKey(Moments):
    """What the kinds of moments have in common that know their keys from a mapping.

    Args:
        entries: Anything by key, in the order of the moments.
    """

    def __init__(self, entries: Mapping[str, object]) -> None:
        self._keys = entries.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # the inherited way would read the moment


class HeldMoments(MomentsByKey):
    """Moments in memory, or mapped from files by what made them.

    Args:
        moments: By key.
    """

    def __init__(self, moments: Mapping[str, InputMoment]) -> None:
        super().__init__(moments)
        self._moments = moments

    def __getitem__(self, key: str) -> InputMoment:
        return self._moments[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment.

        Args:
            key: Its key.

        Returns:
            `(in, in)` or `(in,)`.
        """
        return tuple(self._moments[key].total.shape)


@dataclass(frozen=True, kw_only=True)
class OwnedMoment:
    """What every rank knows of a moment.

    Attributes:
        shape: `(in, in)` or `(in,)`.
        owner: The rank that holds it.
    """

    shape: tuple[int, ...]
    owner: int


class OwnedMoments(MomentsByKey):
    """Moments by key, each on one rank; all ranks know which there are, and of what shape.

    Args:
        entries: What is known of each moment; the same on all ranks.
        held: The moments that this rank owns, at least.
        ranks: The ranks.
    """

    def __init__(self, entries: Mapping[str, OwnedMoment], held: Mapping[str, InputMoment], ranks: Ranks) -> None:
        super().__init__(entries)
        self._entries, self._held, self._ranks = entries, held, ranks

    def __getitem__(self, key: str) -> InputMoment:
        owner = self._entries[key].owner
        if owner != self._ranks.rank:
            raise CaptureError(
                f"{key}: its moment is held by rank {owner}, not by rank {self._ranks.rank}; save the profile and load "
                "it to have all moments on every rank"
            )
        return self._held[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment.

        Args:
            key: Its key.

        Returns:
            `(in, in)` or `(in,)`.
        """
        return self._entries[key].shape

    def owner(self, key: str) -> int:
        """Which rank holds a moment.

        Args:
            key: Its key.

        Returns:
            The rank.
        """
        return self._entries[key].owner

    @property
    def ranks(self) -> Ranks:
        """The ranks that hold them."""
        return self._ranks

    @property
    def entries(self) -> Mapping[str, OwnedMoment]:
        """What is known of each moment on every rank."""
        return self._entries

    @property
    def held(self) -> Mapping[str, InputMoment]:
        """The moments that this rank owns."""
        return self._held


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
