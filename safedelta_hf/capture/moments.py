"""Moments by key, wherever they are: in memory, on disk, summed as they are read, or on another rank."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch

from safedelta_hf.core.moment import InputMoment


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
