"""A moment of few tokens by a factor of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.low_rank import LowRank, Matrix
from safedelta_hf.profile.encodings.encoding import Layout
from safedelta_hf.profile.encodings.ranked import Ranked


@dataclass(frozen=True, kw_only=True)
class Factor(Ranked):
    """`F` of `H = F^T F`, with a row for each token that was read; exact, and read as it is.

    It is made triangular when it is written, so that it tells of the moment and of no token by itself. What is stored
    exactly is stored so where that is smaller; nobody has to ask for it.

    Attributes:
        rank: Rows of the factor.

    Raises:
        ConfigurationError: The rank is no positive whole number.
    """

    name: ClassVar[str] = "factor"

    @override
    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        return {"factor": Layout(dtype=torch.float32, shape=(self.rank, shape[0]))}

    @override
    def encode(self, total: Matrix) -> dict[str, Tensor]:
        assert isinstance(total, LowRank) and total.rest is None, "its rank is known beforehand"
        return {"factor": torch.linalg.qr(total.factor, mode="r").R}

    @override
    def decode(self, stored: Mapping[str, Tensor]) -> LowRank:
        return LowRank(factor=stored["factor"])
