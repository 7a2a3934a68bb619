"""The upper half of a moment in half the bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from safedelta_hf.capture.encodings.encoding import Encoding, Layout
from safedelta_hf.capture.encodings.packing import pack_upper, packed_size, unpack_upper

SMALLEST_RAISE: Final = 2.0**-12
"""First share by which the diagonal is raised if it has to be; doubled until it is enough."""


@dataclass(frozen=True)
class Bfloat16(Encoding):
    """The upper half in bfloat16, the diagonal in float32 and raised until the matrix is positive definite.

    Rounding each entry by up to 2^-9 of itself takes the smallest eigenvalues below zero, by more than the usual
    damping. The diagonal is raised by one share of itself, so inputs of any size are treated alike, and by no more than
    twice what a factorisation needs. A raised diagonal errs towards protecting more.
    """

    name: ClassVar[str] = "bfloat16"

    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        """Two vectors.

        Args:
            shape: `(in, in)`.

        Returns:
            Layouts by name.
        """
        return {
            "upper": Layout(dtype=torch.bfloat16, shape=(packed_size(shape[0]),)),
            "diagonal": Layout(dtype=torch.float32, shape=(shape[0],)),
        }

    def encode(self, total: Tensor) -> dict[str, Tensor]:
        """Store a moment.

        Args:
            total: [in, in], float32.

        Returns:
            Its upper half, and the diagonal that counts.
        """
        rounded, diagonal = total.to(torch.bfloat16), total.diagonal()
        return {"upper": pack_upper(rounded), "diagonal": diagonal * (1.0 + _needed_raise(rounded, diagonal))}

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Read a moment.

        Args:
            stored: What `encode` returned.

        Returns:
            [in, in], float32.
        """
        total = unpack_upper(stored["upper"]).float()
        total.diagonal().copy_(stored["diagonal"])
        return total


def _needed_raise(rounded: Tensor, diagonal: Tensor) -> float:
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    scaled = rounded.float().mul_(scale).mul_(scale[:, None])
    share = 0.0
    while True:
        scaled.diagonal().fill_(1.0 + share)
        if not torch.linalg.cholesky_ex(scaled).info:
            return share
        share = max(2.0 * share, SMALLEST_RAISE)
