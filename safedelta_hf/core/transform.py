"""Right-multiplications `D* = D T`: the form in which every rule but a merge changes a delta.

A transform maps rows independently, so it serves a whole delta, the rows that one rank holds, and the `A` of a
LoRA adapter alike.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A linear map of rows.

    Attributes:
        notes: Numerical trouble met in making it, for the report.
        price: `lam`, where `D T (I + lam H) = D` to within a few roundings, so that what is lost tells the quadratic
            loss of what is kept (`core.curvature.loss_by_price`). None of other maps, and where rounding has more of a
            say.
    """

    notes: tuple[str, ...] = ()
    price: float | None = None

    @abstractmethod
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o j"]:
        """Apply the map to each row.

        Args:
            rows: [rows, in].

        Returns:
            [rows, columns], a new tensor.
        """

    def form(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, ""]:
        """Inner product of rows with what the map makes of them.

        Args:
            rows: [rows, in]; the map is of [in, in].

        Returns:
            The sum over all entries.
        """
        return (rows * self(rows)).sum()


class DeltaMatrix(Protocol):
    """A delta [rows, columns] as one use of its parameter sees it, wherever and in whatever form it is stored."""

    @property
    def rows(self) -> int:
        """Number of outputs that each input feeds, over all ranks."""
        ...

    def column_energy(self, transform: Transform | None = None) -> Tensor:
        """Sum over rows of the squared delta.

        Args:
            transform: Applied to the rows first; the same on all ranks.

        Returns:
            [columns] float32, one for each input.
        """
        ...

    def inner(self, transform: Transform) -> float:
        """Inner product of the delta with its transform; with a Hessian as the transform, twice the quadratic loss.

        Args:
            transform: Applied to the rows; the same on all ranks.

        Returns:
            The sum over all entries.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class KeepColumns(Transform):
    """Keep some columns exactly and compensate for them in the others.

    `D*_S = D_S` and `D*_R = D_S M`, with S the kept and R the other columns.

    Attributes:
        kept: [in] bool, the columns of S.
        response: `M` [kept, others], or None for no compensation.
    """

    kept: Tensor
    response: Tensor | None

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        result = torch.zeros_like(rows)
        kept_rows = rows[:, self.kept]
        result[:, self.kept] = kept_rows
        if self.response is not None:
            result[:, ~self.kept] = kept_rows @ self.response.to(rows.dtype)
        return result


FORM_BLOCK = 256
"""Columns that are multiplied at once; a matter of speed alone."""


@dataclass(frozen=True, kw_only=True)
class SymmetricForm(Transform):
    """A map `T` with `<D, D T> = <D, D H>` for every `D`, at half the cost of the product with `H`.

    `T` is what of `H` stands on and above its diagonal, in blocks; those above count twice.

    Attributes:
        matrix: `H` [in, in], symmetric.
    """

    matrix: Tensor

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        result = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for start in range(0, len(self.matrix), FORM_BLOCK):
            block = slice(start, min(start + FORM_BLOCK, len(self.matrix)))
            form = self.matrix[: block.stop, block].to(rows.dtype)
            torch.matmul(rows[:, block], form[start:], out=result[:, block])
            if start:
                result[:, block].addmm_(rows[:, :start], form[:start], alpha=2.0)
        return result


@dataclass(frozen=True, kw_only=True)
class Dense(Transform):
    """Multiplication with an explicit matrix.

    Attributes:
        matrix: `T` [in, columns], or its diagonal [in].
    """

    matrix: Tensor

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o j"]:
        matrix = self.matrix.to(rows.dtype)
        return rows * matrix if matrix.ndim == 1 else rows @ matrix
