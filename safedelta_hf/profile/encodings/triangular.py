"""The upper half of a moment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safedelta_hf.profile.encodings.encoding import Encoding, Layout
from safedelta_hf.profile.encodings.packing import mirror_, pack_upper, packed_size, unpack_upper


@dataclass(frozen=True)
class Triangular(Encoding):
    """The upper half, exactly: a moment is symmetric, so nothing is lost.

    Where a device summed the two halves in different orders they differ by rounding, and the upper one counts.
    """

    name: ClassVar[str] = "triangular"

    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        """One vector.

        Args:
            shape: `(in, in)`.

        Returns:
            Layouts by name.
        """
        return {"upper": Layout(dtype=torch.float32, shape=(packed_size(shape[0]),))}

    def encode(self, total: Tensor) -> dict[str, Tensor]:
        """Store a moment.

        Args:
            total: [in, in], float32.

        Returns:
            Its upper half.
        """
        return {"upper": pack_upper(total)}

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Read a moment.

        Args:
            stored: What `encode` returned.

        Returns:
            [in, in], float32.
        """
        return mirror_(unpack_upper(stored["upper"]))
