"""The delta of a parameter of which this process holds some slices along the first dimension."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.transform import DeltaMatrix, Transform
from safedelta_hf.deltas.dense import Delta, DenseDelta, DenseMatrix, as_strided, figure_of, round_rows_
from safedelta_hf.distributed.model import Shard
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.records.uses import MatrixView, Use


class ShardedDelta(Delta):
    """Slices of a delta; ranks exchange sums over them, and no weight.

    But for one kind: where the inputs that a product mixes lie along the first dimension (`Conv1D`), the delta is
    assembled while it is adjusted.

    Args:
        own: The delta of this process's slices.
        shape: Shape of the whole parameter.
        shard: Where the slices lie in it.
        ranks: The processes of the run; all of them go through the same deltas in the same order.
    """

    def __init__(self, own: DenseDelta, shape: torch.Size, shard: Shard, ranks: Ranks) -> None:
        self._own, self._shape, self._shard, self._ranks = own, shape, shard, ranks

    @property
    @override
    def device(self) -> torch.device:
        return self._own.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._own.dtype

    @property
    @override
    def tuned_energy(self) -> float:
        return self._summed(self._own.tuned_energy)

    @property
    @override
    def lost_energy(self) -> float:
        return self._summed(self._own.lost_energy)

    @override
    def matrix(self, use: Use) -> DeltaMatrix:
        own = own_view(use, self._shape, self._shard)
        if own is None:
            return DenseMatrix(self._assembled(), use.view)
        return ShardedMatrix(self._own.values, use.view, *own, self._sum)

    @override
    def transformed(self, use: Use, transform: Transform) -> "ShardedDelta":
        own = own_view(use, self._shape, self._shard)
        if own is None:
            whole = DenseMatrix(self._assembled(), use.view).transformed(transform)
            return self._with(self._own.keeping(whole[self._shard.start : self._shard.stop].clone()))
        # Of a parameter with many uses, such as experts, one copy takes the changes of all.
        slices = self._own.keeping(self._own.values.clone()) if self._own.is_unadjusted else self._own
        ShardedMatrix(slices.values, use.view, *own, self._sum).replace(transform)
        return self._with(slices)

    @override
    def zero(self) -> "ShardedDelta":
        return self._with(self._own.zero())

    @override
    def rounded(self) -> "ShardedDelta":
        return self._with(self._own.rounded())

    @override
    def rounded_along(self, factors: Iterable[tuple[Use, Tensor]]) -> "ShardedDelta":
        wanted = self._own.wanted()
        for use, factor in factors:
            own = own_view(use, self._shape, self._shard)
            if own is None:
                whole = self._assembled(wanted)
                round_rows_(whole, use.view, self.dtype, factor)
                wanted = whole[self._shard.start : self._shard.stop].contiguous()
            else:
                round_rows_(wanted, own[0], self.dtype, factor)
        return self._with(self._own.keeping((wanted - self._own.base).contiguous()))

    def weight(self) -> Tensor:
        """The slices of the weight that carries what is kept.

        Returns:
            A new tensor in the dtype of the fine-tuned weight.
        """
        return self._own.weight()

    def _with(self, own: DenseDelta) -> "ShardedDelta":
        return ShardedDelta(own, self._shape, self._shard, self._ranks)

    def _assembled(self, values: Tensor | None = None) -> Tensor:
        assert self._shard.group is not None, "a whole parameter has a dense delta"
        values = self._own.values if values is None else values
        return self._ranks.assembled(values, self._shard.start, self._shard.size, self._shard.group)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum_(tensor, self._shard.group)

    def _summed(self, value: float) -> float:
        return float(self._sum(torch.tensor([value], dtype=torch.float64, device=self.device)))


class ShardedMatrix(DeltaMatrix):
    """A delta of which this process has some rows, or some columns that do not mix with others.

    Args:
        values: This process's slices of the delta, float32, contiguous.
        whole: The matrix as a view of the whole parameter.
        own: What this process has of it, as a view of the slices.
        own_columns: Which columns of the whole matrix that has.
        sum_: Adds up over the ranks that have the rest.
    """

    def __init__(
        self,
        values: Tensor,
        whole: MatrixView,
        own: MatrixView,
        own_columns: slice,
        sum_: Callable[[Tensor], Tensor],
    ) -> None:
        self._own, self._own_columns, self._sum = as_strided(values, own), own_columns, sum_
        self._rows, self._columns = whole.rows, whole.columns

    @property
    @override
    def rows(self) -> int:
        return self._rows

    @override
    def column_energy(self, transform: Transform | None = None) -> Tensor:
        own = self._own if transform is None else self._transformed(transform, self._own)
        energy = torch.zeros(self._columns, device=own.device)
        energy[self._own_columns] = own.square().sum(0)
        return self._sum(energy)

    @override
    def inner(self, transform: Transform) -> float:
        has_columns = self._own.shape[1] == self._columns
        own = figure_of(
            transform.form if has_columns else lambda rows: (rows * self._transformed(transform, rows)).sum(), self._own
        )
        return float(self._sum(torch.tensor([own], dtype=torch.float64, device=self._own.device)))

    def replace(self, transform: Transform) -> None:
        """Transform in place what this process has of the matrix.

        Args:
            transform: Of the whole matrix; a diagonal one, if this process has some columns alone.
        """
        self._own.copy_(self._transformed(transform, self._own))

    def _transformed(self, transform: Transform, own: Tensor) -> Tensor:
        if own.shape[1] == self._columns:
            return transform(own)
        return own * transform(torch.ones((1, self._columns), device=own.device))[:, self._own_columns]


def own_view(use: Use, shape: torch.Size, shard: Shard) -> tuple[MatrixView, slice] | None:
    """What slices of a parameter are of the matrix that a use reads.

    Args:
        use: The use.
        shape: Shape of the whole parameter.
        shard: The slices.

    Returns:
        A view of the slices, [own rows, own columns], and which columns of the matrix these are; None if the columns
        of its rows lie in several slices and mix.
    """
    view, size = use.view, math.prod(shape[1:])
    rows, columns = slice(0, view.rows), slice(0, view.columns)
    if (own := _lines_within(view, size, shard)) is not None:
        rows = own
    elif use.role.is_diagonal and (own := _lines_within(view.transposed, size, shard)) is not None:
        columns = own
    else:
        return None
    first = view.start + rows.start * view.row_stride + columns.start * view.column_stride - shard.start * size
    has_any = own.start < own.stop
    mine = replace(
        view, start=first if has_any else 0, rows=rows.stop - rows.start, columns=columns.stop - columns.start
    )
    return mine, columns


def _lines_within(view: MatrixView, size: int, shard: Shard) -> slice | None:
    """Which rows of a matrix a process has.

    Args:
        view: The matrix.
        size: Entries of one slice of the parameter.
        shard: The slices of the process.

    Returns:
        Their numbers; None if a row lies in several slices.
    """
    starts = view.start + view.row_stride * torch.arange(view.rows)
    slices = starts // size
    if not torch.equal(slices, (starts + view.column_stride * (view.columns - 1)) // size):
        return None
    first, stop = torch.searchsorted(slices, torch.tensor([shard.start, shard.stop])).tolist()
    return slice(first, stop)
