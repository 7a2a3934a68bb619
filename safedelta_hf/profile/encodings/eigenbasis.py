"""The largest directions of a moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.low_rank import LowRank
from safedelta_hf.profile.encodings.encoding import Layout
from safedelta_hf.profile.encodings.ranked import Ranked

SPARE_DIRECTIONS: Final = 16
"""Directions beyond the rank that the search starts with; the last ones found are the least exact."""
SEED: Final = 0
"""Of the random directions that the search starts with: the same moment gives the same bytes."""


@dataclass(frozen=True, kw_only=True)
class Eigenbasis(Ranked):
    """The eigenvectors of the largest eigenvalues, and the diagonal of what they leave.

    The diagonal of the moment stays right, and the matrix positive semi-definite; what inputs have in common beyond
    the stored directions is lost. Moments that would not be smaller than their exact upper half are stored as that.

    Attributes:
        rank: Number of eigenvectors.

    Raises:
        ConfigurationError: The rank is no positive whole number.
    """

    name: ClassVar[str] = "eigenbasis"

    @override
    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        shapes = {"vectors": (shape[0], self.rank), "values": (self.rank,), "rest": (shape[0],)}
        return {part: Layout(dtype=torch.float32, shape=of) for part, of in shapes.items()}

    @override
    def encode(self, total: Tensor) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            found, _, _ = torch.svd_lowrank(total, q=min(len(total), self.rank + SPARE_DIRECTIONS))
        values, turned = torch.linalg.eigh(found.T @ total @ found)
        values, vectors = values[-self.rank :].clamp_min(0), (found @ turned)[:, -self.rank :].contiguous()
        vectors[total.diagonal() == 0] = 0  # an input that is never active stays so
        rest = (total.diagonal() - vectors.square() @ values).clamp_min(0)
        return {"vectors": vectors, "values": values.contiguous(), "rest": rest}

    @override
    def decode(self, stored: Mapping[str, Tensor]) -> LowRank:
        return LowRank(factor=(stored["vectors"] * stored["values"].sqrt()).T, rest=stored["rest"])
