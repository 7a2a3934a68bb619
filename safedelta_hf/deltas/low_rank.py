"""The delta of a low-rank adapter: a transform changes one factor, and the product is never formed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.rounding import round_columns
from safedelta_hf.core.transform import DeltaMatrix, Transform
from safedelta_hf.deltas.dense import Delta
from safedelta_hf.errors import AdapterError
from safedelta_hf.records.uses import MatrixView, Use

Pair = tuple[Tensor, Tensor]
"""`L` [first, rank] and `R` [rank, second]."""


@dataclass(frozen=True, kw_only=True)
class FactoredMatrix(DeltaMatrix):
    """A delta `s L R` as one use sees it, [rows, columns]. Sums are taken in float64: the factors are small.

    Attributes:
        left: `L` [rows, rank] float32.
        right: `R` [rank, columns] float32.
        scaling: `s`.
    """

    left: Tensor
    right: Tensor
    scaling: float

    @property
    @override
    def rows(self) -> int:
        return len(self.left)

    @override
    def column_energy(self, transform: Transform | None = None) -> Tensor:
        # s^2 diag(R^T (L^T L) R)
        right = (self.right if transform is None else transform(self.right)).double()
        return (right * (self._gram() @ right)).sum(0).clamp_min(0).float()

    @override
    def inner(self, transform: Transform) -> float:
        return float((self._gram() * (self.right.double() @ transform(self.right).double().T)).sum())

    def _gram(self) -> Tensor:
        left = self.left.double()
        return self.scaling**2 * (left.T @ left)


class FactoredDelta(Delta):
    """The delta of an adapter, `s L R` in the shape of its parameter, of low rank before and after.

    Args:
        left: `L` [first, rank], of any floating dtype.
        right: `R` [rank, second].
        scaling: `s`.
        adjusted: The factors of what is kept, float32; None for all of it.
    """

    def __init__(self, left: Tensor, right: Tensor, scaling: float, adjusted: Pair | None = None) -> None:
        self._tuned = (left.detach(), right.detach())
        self._scaling = scaling
        self._adjusted = (left.detach().float(), right.detach().float()) if adjusted is None else adjusted

    @property
    def factors(self) -> Pair:
        """`L` [first, rank] and `R` [rank, second] of what is kept, float32."""
        return self._adjusted

    @property
    def values(self) -> Tensor:
        """What is kept of the delta, `s L R` [first, second] float32."""
        left, right = self._adjusted
        return self._scaling * (left @ right)

    @property
    @override
    def device(self) -> torch.device:
        return self._tuned[0].device

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._tuned[1].dtype

    @property
    @override
    def tuned_energy(self) -> float:
        return energy(*self._tuned, self._scaling)

    @property
    @override
    def lost_energy(self) -> float:
        return distance(self._tuned, self._adjusted, self._scaling)

    @property
    @override
    def is_factored(self) -> bool:
        return True

    @override
    def matrix(self, use: Use) -> FactoredMatrix:
        left, right = self._adjusted
        if self._is_transposed(use.view):
            left, right = right.T, left.T
        return FactoredMatrix(left=left, right=right, scaling=self._scaling)

    @override
    def transformed(self, use: Use, transform: Transform) -> "FactoredDelta":
        seen = self.matrix(use)
        seen = replace(seen, right=transform(seen.right))
        kept = (seen.right.T, seen.left.T) if self._is_transposed(use.view) else (seen.left, seen.right)
        return FactoredDelta(*self._tuned, self._scaling, kept)

    @override
    def zero(self) -> "FactoredDelta":
        left, right = self._adjusted
        return FactoredDelta(*self._tuned, self._scaling, (left, torch.zeros_like(right)))

    @override
    def rounded(self) -> "FactoredDelta":
        pairs = zip(self._adjusted, self._tuned, strict=True)
        left, right = (value.to(tuned.dtype).float() for value, tuned in pairs)
        return FactoredDelta(*self._tuned, self._scaling, (left, right))

    @override
    def rounded_along(self, factors: Iterable[tuple[Use, Tensor]]) -> "FactoredDelta":
        # Of `s L R` the inputs stand in one factor; an error in one of its rows reaches the outputs through the other.
        left, right = self._adjusted
        for use, factor in factors:
            if self._is_transposed(use.view):
                left = round_columns(left.T, self._tuned[0].dtype, factor).T.float()
            else:
                right = round_columns(right, self._tuned[1].dtype, factor).float()
        return FactoredDelta(*self._tuned, self._scaling, (left, right))

    def _is_transposed(self, view: MatrixView) -> bool:
        first, second = len(self._tuned[0]), self._tuned[1].shape[1]
        product = MatrixView.contiguous(first, second, view.start)
        if view in (product, product.transposed):
            return view != product
        raise AdapterError(
            f"its model uses a part [{view.rows}, {view.columns}] of the [{first}, {second}] that the adapter tunes as "
            "one product; merge the adapter and use adjust_model"
        )


class StackedDelta(Delta):
    """The delta of a stack of matrices, such as experts: one product for each.

    Args:
        products: The delta of each matrix, in the order in which they are stored.
        size: Entries of one matrix.
    """

    def __init__(self, products: Sequence[FactoredDelta], size: int) -> None:
        self.products = tuple(products)
        self._size = size

    @property
    @override
    def device(self) -> torch.device:
        return self.products[0].device

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.products[0].dtype

    @property
    @override
    def tuned_energy(self) -> float:
        return sum(one.tuned_energy for one in self.products)

    @property
    @override
    def lost_energy(self) -> float:
        return sum(one.lost_energy for one in self.products)

    @property
    @override
    def is_factored(self) -> bool:
        return True

    @override
    def matrix(self, use: Use) -> FactoredMatrix:
        return self.products[self._number(use)].matrix(use)

    @override
    def transformed(self, use: Use, transform: Transform) -> "StackedDelta":
        number = self._number(use)
        return self._with(number, self.products[number].transformed(use, transform))

    @override
    def zero(self) -> "StackedDelta":
        return StackedDelta([one.zero() for one in self.products], self._size)

    @override
    def rounded(self) -> "StackedDelta":
        return StackedDelta([one.rounded() for one in self.products], self._size)

    @override
    def rounded_along(self, factors: Iterable[tuple[Use, Tensor]]) -> "StackedDelta":
        products = list(self.products)
        for use, factor in factors:
            number = self._number(use)
            products[number] = products[number].rounded_along([(use, factor)])
        return StackedDelta(products, self._size)

    def _with(self, number: int, product: FactoredDelta) -> "StackedDelta":
        return StackedDelta((*self.products[:number], product, *self.products[number + 1 :]), self._size)

    def _number(self, use: Use) -> int:
        if use.view.entries > self._size or use.view.start % self._size:
            raise AdapterError("its model does not use it matrix by matrix; merge the adapter and use adjust_model")
        return use.view.start // self._size


def energy(left: Tensor, right: Tensor, scaling: float) -> float:
    """Squared norm of `s L R`, from the Gram matrices of its factors.

    Args:
        left: `L` [first, rank].
        right: `R` [rank, second].
        scaling: `s`.

    Returns:
        The sum of the squares of all entries.
    """
    left, right = left.double(), right.double()
    return max(float(scaling**2 * ((left.T @ left) * (right @ right.T)).sum()), 0.0)


def distance(one: Pair, other: Pair, scaling: float) -> float:
    """Squared norm of `s (L R - L' R')`.

    Args:
        one: `L` and `R`.
        other: `L'` and `R'`.
        scaling: `s`.

    Returns:
        The sum of the squares of all entries.
    """
    # The difference is itself a product of factors, of twice the rank.
    left = torch.cat([one[0].double(), other[0].double()], dim=1)
    right = torch.cat([one[1].double(), -other[1].double()], dim=0)
    return energy(left, right, scaling)
