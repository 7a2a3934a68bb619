"""What the published rightward sweep leaves of later columns: for many rows at once, or row by row for a few."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safedelta_hf.core.compensation import SWEEP_GROUP, sweep_ratios, sweep_response
from safedelta_hf.core.curvature import Curvature

CHUNK = 64 * SWEEP_GROUP
"""Columns that are swept between two large products; a matter of speed alone."""


class SweepRatios:
    """Rows `U_mn / U_mm` of the columns that are kept, made when they are first asked for.

    Args:
        curvature: Damped curvature of the layer.
    """

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature
        self._rows = curvature.factor.new_zeros(0, len(curvature.factor))

    def of(self, kept: Int[Tensor, " s"]) -> Float[Tensor, "s i"]:
        """The rows of some columns.

        Args:
            kept: [kept], in increasing order; those asked for before stand first.

        Returns:
            [kept, in].
        """
        new = kept[len(self._rows) :]
        if len(new):
            self._rows = torch.cat([self._rows, sweep_ratios(self.curvature, new)])
        return self._rows


@dataclass(frozen=True, kw_only=True)
class SweepResidual:
    """What kept columns leave undone in a block of later columns, `D_B - D_S M_B`.

    Attributes:
        ratios: Of the layer.
        kept: [in] bool, the columns of S, all left of the block.
        start: First column of the block; a multiple of `SWEEP_GROUP`.
        stop: Column after the block.
        notes: Numerical trouble met in making it.
    """

    ratios: SweepRatios
    kept: Tensor
    start: int
    stop: int
    notes: tuple[str, ...] = ()

    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o b"]:
        """Apply the map to each row.

        Args:
            rows: [rows, in].

        Returns:
            [rows, block], a new tensor.
        """
        block = rows[:, self.start : self.stop]
        kept = self.kept.nonzero().squeeze(1)
        # The response costs as much as `in * kept` rows, and serves them all.
        if len(rows) < len(kept):
            return block - swept(self.ratios.curvature.factor.to(rows), rows, self.kept, self.start, self.stop)
        columns = torch.arange(self.start, self.stop, device=kept.device)
        response = sweep_response(self.ratios.of(kept), kept, columns)
        return block - rows[:, kept] @ response.to(rows.dtype)


def swept(
    factor: Float[Tensor, "i i"], rows: Float[Tensor, "o i"], kept: Bool[Tensor, " i"], start: int, stop: int
) -> Float[Tensor, "o b"]:
    """What a block of columns receives from the sweep over kept columns left of it, without forming `U`.

    With `x_m = r_m / U_mm` for the residual `r_m` of each kept column, and zero for the others, what is received is
    `y = x U`. As `U = R^-1`, `y R = x`: forward substitution with `R` alone gives `y` from left to right.

    Args:
        factor: `R` [in, in], upper triangular.
        rows: [rows, in].
        kept: [in], the columns of S.
        start: First column of the block; a multiple of `SWEEP_GROUP`.
        stop: Column after the block.

    Returns:
        [rows, block].
    """
    received = rows.new_zeros(len(rows), start)
    for left in range(0, start, CHUNK):
        right = min(left + CHUNK, start)
        carried = received[:, :left] @ factor[:left, left:right]
        for first in range(left, right, SWEEP_GROUP):
            group = slice(first, first + SWEEP_GROUP)
            inner = slice(first - left, first - left + SWEEP_GROUP)
            carry = carried[:, inner] + received[:, left:first] @ factor[left:first, group]
            corner = factor[group, group]
            before = _over(-carry, corner)
            source = (rows[:, group] - before) * corner.diagonal() * kept[group]
            received[:, group] = _over(source - carry, corner)
    return _over(-(received @ factor[:start, start:stop]), factor[start:stop, start:stop])


def _over(rows: Tensor, triangle: Tensor) -> Tensor:
    quotient: Tensor = torch.linalg.solve_triangular(triangle, rows, upper=True, left=False)
    return quotient
