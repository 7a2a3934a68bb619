"""Moments of which each is in the memory of one rank, its owner."""

from collections.abc import Mapping
from dataclasses import dataclass

from safedelta_hf.capture.moments import MomentsByKey
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import CaptureError
from safedelta_hf.ranks import Ranks


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
