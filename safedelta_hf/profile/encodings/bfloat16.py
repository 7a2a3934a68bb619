"""The Cholesky factor of a moment in half the bits of its upper half."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.profile.encodings.encoding import Encoding, Layout
from safedelta_hf.profile.encodings.triangular import pack_upper, packed_size, unpack_upper

SMALLEST_RAISE: Final = 2.0**-24
"""First share by which the diagonal is raised if the moment has no factor."""
RAISE_FACTOR: Final = 4.0
NOTHING: Final = 1e-12
"""Mean square of an input, in units of the mean over inputs, below which its size does not count."""


@dataclass(frozen=True)
class Bfloat16(Encoding):
    """The upper triangular `U` of `H = U^T U`, in bfloat16.

    The moment itself must not be rounded so: entries that are off by 2^-8 of themselves move the small eigenvalues by
    2^-8 of the large ones, far below zero. What a rounded factor gives is positive semi-definite whatever the rounding,
    and its small eigenvalues move by the square of that. Where a moment is singular, its diagonal is raised by the
    least share of itself that gives it a factor, about 10^-6.
    """

    name: ClassVar[str] = "bfloat16"

    @override
    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        return {"factor": Layout(dtype=torch.bfloat16, shape=(packed_size(shape[0]),))}

    @override
    def encode(self, total: Tensor) -> dict[str, Tensor]:
        diagonal = total.diagonal()
        # Inputs of any size are treated alike, but for those whose squares are too small for float32 to tell.
        size = diagonal.clamp_min(NOTHING * float(diagonal.mean())).sqrt()
        is_active = diagonal > 0
        scale = torch.where(is_active, 1.0 / size, 0.0)
        factor = _factor(total * scale * scale[:, None] + torch.diag((~is_active).float()))
        return {"factor": pack_upper((factor * torch.where(is_active, size, 0.0)).to(torch.bfloat16))}

    @override
    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        factor = unpack_upper(stored["factor"]).float()
        return factor.T @ factor


def _factor(scaled: Tensor) -> Tensor:
    share, diagonal = 0.0, scaled.diagonal().clone()
    while True:
        scaled.diagonal().copy_(diagonal + share)
        found = torch.linalg.cholesky_ex(scaled, upper=True)
        if not found.info:
            factor: Tensor = found.L
            return factor
        share = max(RAISE_FACTOR * share, SMALLEST_RAISE)
