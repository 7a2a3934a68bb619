"""How moments are stored: one file per kind."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.profile.encodings.bfloat16 import Bfloat16
from safedelta_hf.profile.encodings.eigenbasis import Eigenbasis
from safedelta_hf.profile.encodings.encoding import Encoding
from safedelta_hf.profile.encodings.float32 import Float32
from safedelta_hf.profile.encodings.triangular import Triangular

ENCODINGS: Final[Mapping[str, type[Encoding]]] = MappingProxyType(
    {kind.name: kind for kind in (Float32, Triangular, Bfloat16, Eigenbasis)}
)
"""The kinds by name."""


def encoding_of(storage: str | Encoding) -> Encoding:
    """The encoding that a setting names.

    Args:
        storage: An encoding, or its text: a name, with settings after a colon, such as "eigenbasis:256".

    Returns:
        The encoding.

    Raises:
        ConfigurationError: There is none of that name, or not with these settings.
    """
    if isinstance(storage, Encoding):
        return storage
    name, _, settings = storage.partition(":") if isinstance(storage, str) else (storage, "", "")
    if name not in ENCODINGS:
        raise ConfigurationError(f"storage={storage!r} is not one of {', '.join(ENCODINGS)}")
    try:
        return ENCODINGS[name].parse(settings)
    except ValueError as error:
        raise ConfigurationError(f"storage={storage!r}: {error}") from error


def encoding_for(shape: tuple[int, ...], storage: Encoding) -> Encoding:
    """What a moment of some shape is stored in.

    Args:
        shape: Shape of the moment.
        storage: What was asked for.

    Returns:
        The encoding; a moment of the diagonal kind is small, and stored as it is.
    """
    return Float32() if len(shape) == 1 else storage.suited(shape)


__all__ = [
    "ENCODINGS",
    "Bfloat16",
    "Eigenbasis",
    "Encoding",
    "Float32",
    "Triangular",
    "encoding_for",
    "encoding_of",
]
