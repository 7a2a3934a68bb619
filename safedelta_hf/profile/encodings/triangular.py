"""The upper half of a moment, as one vector row by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.profile.encodings.encoding import Encoding, Layout

BLOCK = 512
"""Rows that are mirrored at a time: the temporary memory is one such strip."""


def packed_size(size: int) -> int:
    """Entries of the upper half.

    Args:
        size: Rows of the matrix.

    Returns:
        Those on and above the diagonal.
    """
    return size * (size + 1) // 2


def pack_upper(matrix: Tensor) -> Tensor:
    """Take the entries on and above the diagonal.

    Args:
        matrix: [size, size].

    Returns:
        [size * (size + 1) / 2]: row 0, row 1 from its diagonal on, and so forth.
    """
    size = len(matrix)
    packed = matrix.new_empty(packed_size(size))
    start = 0
    for row in range(size):
        packed[start : start + size - row] = matrix[row, row:]
        start += size - row
    return packed


def unpack_upper(packed: Tensor) -> Tensor:
    """Put the entries back.

    Args:
        packed: What `pack_upper` returned.

    Returns:
        [size, size], zero below the diagonal.
    """
    size = (isqrt(8 * len(packed) + 1) - 1) // 2
    matrix = packed.new_zeros((size, size))
    start = 0
    for row in range(size):
        matrix[row, row:] = packed[start : start + size - row]
        start += size - row
    return matrix


def mirror_(matrix: Tensor) -> Tensor:
    """Fill the lower half from the upper one, in place.

    Args:
        matrix: [size, size], zero below the diagonal.

    Returns:
        The matrix, symmetric.
    """
    size = len(matrix)
    for first in range(0, size, BLOCK):
        last = min(first + BLOCK, size)
        matrix[last:, first:last] = matrix[first:last, last:].T
        square = matrix[first:last, first:last]
        square += torch.triu(square, diagonal=1).T
    return matrix


@dataclass(frozen=True)
class Triangular(Encoding):
    """The upper half, exactly: a moment is symmetric, so nothing is lost.

    Where a device summed the two halves in different orders they differ by rounding, and the upper one counts.
    """

    name: ClassVar[str] = "triangular"

    @override
    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        return {"upper": Layout(dtype=torch.float32, shape=(packed_size(shape[0]),))}

    @override
    def encode(self, total: Tensor) -> dict[str, Tensor]:
        return {"upper": pack_upper(total)}

    @override
    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        return mirror_(unpack_upper(stored["upper"]))
