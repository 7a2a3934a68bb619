"""Right-multiplications `D* = D T`: the form in which every rule but a merge changes a delta.

A transform maps rows independently, so it serves a whole delta, the rows that one rank holds, and the `A` of a
LoRA adapter alike.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Transform(Protocol):
    """A linear map of rows, [rows, in] to [rows, columns]."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Numerical trouble met in making it, for the report."""
        ...

    def __call__(self, rows: Tensor) -> Tensor:
        """Apply the map to each row."""
        ...


@dataclass(frozen=True, kw_only=True)
class KeepColumns:
    """Keep some columns exactly and compensate for them in the others.

    `D*_S = D_S` and `D*_R = D_S M`, with S the kept and R the other columns.

    Attributes:
        kept: [in] bool, the columns of S.
        response: `M` [kept, others], or None for no compensation.
        notes: Numerical trouble met in making it.
    """

    kept: Tensor
    response: Tensor | None
    notes: tuple[str, ...] = ()

    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """Apply the map to each row.

        Args:
            rows: [rows, in].

        Returns:
            [rows, in], a new tensor.
        """
        result = torch.zeros_like(rows)
        kept_rows = rows[:, self.kept]
        result[:, self.kept] = kept_rows
        if self.response is not None:
            result[:, ~self.kept] = kept_rows @ self.response.to(rows.dtype)
        return result


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Multiplication with an explicit matrix.

    Attributes:
        matrix: `T` [in, columns], or its diagonal [in].
        notes: Numerical trouble met in making it.
    """

    matrix: Tensor
    notes: tuple[str, ...] = ()

    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o j"]:
        """Apply the map to each row.

        Args:
            rows: [rows, in].

        Returns:
            [rows, columns], a new tensor.
        """
        matrix = self.matrix.to(rows.dtype)
        return rows * matrix if matrix.ndim == 1 else rows @ matrix
