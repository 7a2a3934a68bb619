"""The delta of a parameter that every process holds whole, as under DDP: each computes some of its rows."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.rounding import round_columns
from safedelta_hf.core.transform import Transform
from safedelta_hf.deltas.dense import DenseDelta, DenseMatrix, as_strided, figure_of
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.records.uses import MatrixView, Use

SHARED_WORK: Final = 1 << 26
"""Multiplications that a product has to take for its rows to be worth sending: those of 400 rows of 400 inputs."""


class ReplicatedDelta(DenseDelta):
    """A dense delta that is the same on all ranks; what multiplies its rows is shared out among them.

    Args:
        tuned: Fine-tuned weight, in the dtype of the model.
        base: Base weight of the same shape, on any device.
        ranks: The processes of the run; all of them go through the same deltas in the same order.

    Raises:
        NumericalError: Their difference is too large for float32.
    """

    def __init__(self, tuned: Tensor, base: Tensor, ranks: Ranks) -> None:
        super().__init__(tuned, base)
        self._ranks = ranks

    @override
    def matrix(self, use: Use) -> DenseMatrix:
        return ReplicatedMatrix(self.values, use.view, self._ranks) if is_shared(use.view) else super().matrix(use)

    @override
    def rounded_along(self, factors: Iterable[tuple[Use, Tensor]]) -> DenseDelta:
        wanted = self.wanted()
        for use, factor in factors:
            rows = as_strided(wanted, use.view)
            ranks = self._ranks if is_shared(use.view) else Ranks()
            rows.copy_(by_rows(ranks, partial(round_columns, dtype=self.dtype, factor=factor), rows))
        return self.keeping(wanted.sub_(self.base))


class ReplicatedMatrix(DenseMatrix):
    """A delta that every rank holds whole, laid out as [rows, columns]; each rank transforms some rows.

    Args:
        delta: Delta in the shape of its parameter, float32, contiguous; the same on all ranks.
        view: The matrix in it that is used.
        ranks: They.
    """

    def __init__(self, delta: Tensor, view: MatrixView, ranks: Ranks) -> None:
        super().__init__(delta, view)
        self._ranks = ranks

    @override
    def inner(self, transform: Transform) -> float:
        own = self._matrix.tensor_split(self._ranks.size)[self._ranks.rank]
        found = figure_of(transform.form, own)
        return float(self._ranks.sum_(torch.tensor([found], dtype=torch.float64, device=own.device)))

    @override
    def applied(self, transform: Transform) -> Tensor:
        return by_rows(self._ranks, transform, self._matrix)


def is_shared(view: MatrixView) -> bool:
    """Whether a product with what a use reads is worth sharing out.

    Args:
        view: The matrix.

    Returns:
        The same on all ranks.
    """
    return view.rows * view.columns**2 >= SHARED_WORK


def by_rows(ranks: Ranks, compute: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """Compute rows that do not depend on each other, each on one rank.

    Args:
        ranks: The processes.
        compute: Takes rows [some, in] to rows [some, out] of the same data type.
        matrix: [rows, in], the same on all ranks.

    Returns:
        [rows, out], the same bits on all ranks.
    """
    if ranks.size == 1:
        return compute(matrix)
    parts = matrix.tensor_split(ranks.size)
    return ranks.joined(compute(parts[ranks.rank]), [len(part) for part in parts])
