"""What encodings of a stated rank have in common."""

from dataclasses import dataclass
from typing import Self

from typing_extensions import override

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.profile.encodings.encoding import Encoding
from safedelta_hf.profile.encodings.triangular import Triangular


@dataclass(frozen=True, kw_only=True)
class Ranked(Encoding):
    """An encoding of a stated rank; a moment that it would make no smaller is stored exactly.

    Attributes:
        rank: The rank.

    Raises:
        ConfigurationError: The rank is no positive whole number.
    """

    rank: int

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigurationError(f"{type(self).__name__}: rank={self.rank!r} must be a whole number of at least 1")

    @override
    def __str__(self) -> str:
        return f"{self.name}:{self.rank}"

    @classmethod
    @override
    def parse(cls, settings: str) -> Self:
        if not (settings.isascii() and settings.isdigit()):
            raise ValueError(f"{cls.name} needs a rank, such as {cls.name}:256")
        return cls(rank=int(settings))

    @override
    def suited(self, shape: tuple[int, ...]) -> Encoding:
        exact = Triangular()
        return self if self.bytes(shape) < exact.bytes(shape) else exact
