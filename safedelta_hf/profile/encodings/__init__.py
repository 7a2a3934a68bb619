"""How moments are stored: one file per kind."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.profile.encodings.bfloat16 import Bfloat16
from safedelta_hf.profile.encodings.eigenbasis import Eigenbasis
from safedelta_hf.profile.encodings.encoding import Encoding
from safedelta_hf.profile.encodings.factor import Factor
from safedelta_hf.profile.encodings.float32 import Float32
from safedelta_hf.profile.encodings.triangular import Triangular

ENCODINGS: Final[Mapping[str, type[Encoding]]] = MappingProxyType(
    {kind.name: kind for kind in (Float32, Triangular, Factor, Bfloat16, Eigenbasis)}
)
"""The kinds by name."""


def encoding_of(storage: str | Encoding, *, is_stored: bool = False) -> Encoding:
    """The encoding that a setting names.

    Args:
        storage: An encoding, or its text: a name, with settings after a colon, such as "eigenbasis:256".
        is_stored: Whether it says how a moment is stored already, not how one is to be.

    Returns:
        The encoding.

    Raises:
        ConfigurationError: There is none of that name, or not with these settings, or it cannot be asked for.
    """
    if not is_stored and (isinstance(storage, Factor) or str(storage).partition(":")[0] == Factor.name):
        raise ConfigurationError(
            f"storage={str(storage)!r} cannot be asked for: moments of few tokens are stored so by themselves, where "
            f"that is smaller, with storage={Triangular.name!r}"
        )
    if isinstance(storage, Encoding):
        return storage
    name, _, settings = storage.partition(":") if isinstance(storage, str) else (storage, "", "")
    if name not in ENCODINGS:
        raise ConfigurationError(f"storage={storage!r} is not one of {', '.join(ENCODINGS)}")
    try:
        return ENCODINGS[name].parse(settings)
    except ValueError as error:
        raise ConfigurationError(f"storage={storage!r}: {error}") from error


def encoding_for(shape: tuple[int, ...], storage: Encoding, rank: int | None = None) -> Encoding:
    """What a moment of some shape is stored in.

    Args:
        shape: Shape of the moment.
        storage: What was asked for.
        rank: Rows of its factor, if it has one.

    Returns:
        The encoding; a moment of the diagonal kind is small, and stored as it is.
    """
    if len(shape) == 1:
        return Float32()
    suited = storage.suited(shape)
    return Factor(rank=rank).suited(shape) if suited == Triangular() and rank is not None else suited


__all__ = [
    "ENCODINGS",
    "Bfloat16",
    "Eigenbasis",
    "Encoding",
    "Factor",
    "Float32",
    "Triangular",
    "encoding_for",
    "encoding_of",
]
