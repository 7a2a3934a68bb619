"""The delta of a parameter of which this process holds some slices along the first dimension."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safedelta_hf.core.transform import Transform
from safedelta_hf.deltas.dense import DeltaMatrix, DenseDelta, MatrixDelta, as_strided
from safedelta_hf.distributed.model import Shard
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.records import MatrixView, Use


class ShardedDelta:
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
    def device(self) -> torch.device:
        """Where it is."""
        return self._own.device

    @property
    def tuned_energy(self) -> float:
        """Squared norm of tuned minus base, over all ranks."""
        return self._summed(self._own.tuned_energy)

    @property
    def lost_energy(self) -> float:
        """Squared norm of tuned minus adjusted, over all ranks."""
        return self._summed(self._own.lost_energy)

    def matrix(self, use: Use) -> DeltaMatrix:
        """The adjusted delta as one use sees it.

        Args:
            use: The use.

        Returns:
            Its statistics over all ranks.
        """
        share = _share(use, self._shape, self._shard)
        if share is None:
            return MatrixDelta(self._assembled(), use.view)
        return ShardedMatrix(as_strided(self._own.values, share.view), share, self._sum)

    def transformed(self, use: Use, transform: Transform) -> "ShardedDelta":
        """The delta with a transform applied to its rows.

        Args:
            use: Which rows.
            transform: The transform of the whole rows.

        Returns:
            A delta of the same weights.
        """
        share = _share(use, self._shape, self._shard)
        if share is None:
            whole = MatrixDelta(self._assembled(), use.view).transformed(transform)
            return self._with(whole[self._shard.start : self._shard.stop].clone())
        values = self._own.values.clone(memory_format=torch.contiguous_format)
        matrix = as_strided(values, share.view)
        matrix.copy_(share.through(transform, matrix))
        return self._with(values)

    def zero(self) -> "ShardedDelta":
        """The delta with nothing of it kept.

        Returns:
            A new delta of the same weights.
        """
        return ShardedDelta(self._own.zero(), self._shape, self._shard, self._ranks)

    def weight(self) -> Tensor:
        """The slices of the weight that carries what is kept.

        Returns:
            A new tensor in the dtype of the fine-tuned weight.
        """
        return self._own.weight()

    def _with(self, values: Tensor) -> "ShardedDelta":
        return ShardedDelta(self._own.keeping(values), self._shape, self._shard, self._ranks)

    def _assembled(self) -> Tensor:
        assert self._shard.group is not None, "a whole parameter has a dense delta"
        return self._ranks.assembled(self._own.values, self._shard.start, self._shard.size, self._shard.group)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self._ranks.sum_(tensor, self._shard.group)

    def _summed(self, value: float) -> float:
        return float(self._sum(torch.tensor([value], dtype=torch.float64, device=self.device)))


class ShardedMatrix:
    """Statistics of a delta over all ranks.

    Args:
        own: What this process has of it.
        share: What that is.
        sum_: Adds up over the ranks that have the rest.
    """

    def __init__(self, own: Tensor, share: "_Share", sum_: Callable[[Tensor], Tensor]) -> None:
        self._own, self._share, self._sum = own, share, sum_

    @property
    def rows(self) -> int:
        """Number of outputs that each input feeds, over all ranks."""
        return self._share.rows

    @property
    def columns(self) -> int:
        """Number of inputs, over all ranks."""
        return self._share.columns

    def column_energy(self, transform: Transform | None = None) -> Tensor:
        """Sum over rows of the squared (transformed) delta.

        Args:
            transform: Applied to the rows first; the same on all ranks.

        Returns:
            [columns] float32.
        """
        own = self._own if transform is None else self._share.through(transform, self._own)
        energy = torch.zeros(self.columns, device=self._own.device)
        energy[self._share.own_columns] = own.square().sum(0)
        return self._sum(energy)

    def inner(self, transform: Transform) -> float:
        """Inner product of the delta with its transform.

        Args:
            transform: Applied to the rows; the same on all ranks.

        Returns:
            The sum over all entries.
        """
        return float(self._sum((self._own * self._share.through(transform, self._own)).sum().reshape(1)))


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What a process has of a matrix [rows, columns]: some rows, or some columns that do not mix with others.

    Attributes:
        rows: Of the whole.
        columns: Of the whole.
        own_columns: Which of them this process has.
        view: The share as a view of this process's slices of the parameter, [own rows, own columns].
    """

    rows: int
    columns: int
    own_columns: slice
    view: MatrixView

    def through(self, transform: Transform, own: Tensor) -> Tensor:
        """Apply the transform of the whole matrix to a share of it.

        Args:
            transform: A diagonal one, if the share has some columns alone.
            own: The share.

        Returns:
            A new tensor of its shape.
        """
        if own.shape[1] == self.columns:
            return transform(own)
        return own * transform(torch.ones((1, self.columns), device=own.device))[:, self.own_columns]


def _share(use: Use, shape: torch.Size, shard: Shard) -> _Share | None:
    """What slices of a parameter are of one of its uses.

    Args:
        use: The use.
        shape: Shape of the whole parameter.
        shard: The slices.

    Returns:
        The share, or None if the columns of its rows lie in several slices and mix.
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
    return _Share(rows=view.rows, columns=view.columns, own_columns=columns, view=mine)


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
