"""Moments of fewer directions than inputs: `F^T F` and a diagonal, of which the matrix is never formed.

Data of `t` tokens leaves a layer of `in` inputs with a moment of rank `t`. While that is less than half of `in`, the
factor `F` [t, in] is smaller than the upper half of the matrix, and what is solved with it takes `t^2 in` operations in
place of `in^3`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.transform import Transform

BLOCK = 256
"""Rows of a Gram matrix that are computed at a time, so that its upper half is not; and columns that are summed over in
float64 at a time, so that no copy of the factor is made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank(Transform):
    """A symmetric positive semi-definite matrix `F^T F + diag(d)`; as a transform, multiplication with it.

    Attributes:
        factor: `F` [rank, in] float32.
        rest: `d` [in], nowhere negative; None for zeros.
    """

    factor: Tensor
    rest: Tensor | None = None

    ndim = 2

    def __len__(self) -> int:
        return self.factor.shape[1]

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        factor = self.factor.to(rows.dtype)
        product = (rows @ factor.T) @ factor
        return product if self.rest is None else product + rows * self.rest.to(rows.dtype)

    @override
    def form(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, ""]:
        # `|D F^T|^2`: one product in place of two, and nowhere negative.
        found = (rows @ self.factor.to(rows.dtype).T).square().sum()
        return found if self.rest is None else found + rows.square().sum(0) @ self.rest.to(rows.dtype)

    @property
    def shape(self) -> torch.Size:
        """That of the matrix, [in, in]."""
        return torch.Size((len(self), len(self)))

    @property
    def rank(self) -> int:
        """Rows of the factor."""
        return len(self.factor)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it is made of."""
        return (self.factor,) if self.rest is None else (self.factor, self.rest)

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.factor.device

    def diagonal(self) -> Tensor:
        """The diagonal of the matrix.

        Returns:
            A new tensor, [in].
        """
        found = self.factor.square().sum(0)
        return found if self.rest is None else found + self.rest

    def any(self) -> bool:
        """Whether the matrix is not zero.

        Returns:
            Whether it is not.
        """
        return any(bool(tensor.any()) for tensor in self.tensors)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "LowRank":
        """The same on a device, as of a tensor.

        Args:
            device: The device.
            dtype: Data type of the result.

        Returns:
            It, or a copy.
        """
        rest = None if self.rest is None else self.rest.to(device, dtype)
        return LowRank(factor=self.factor.to(device, dtype), rest=rest)

    def __mul__(self, share: float) -> "LowRank":
        rest = None if self.rest is None else self.rest * share
        return LowRank(factor=self.factor * share**0.5, rest=rest)

    def raised(self, amount: Tensor) -> "LowRank":
        """The matrix with something added to its diagonal.

        Args:
            amount: A scalar, or [in].

        Returns:
            A new one, with the same factor.
        """
        rest = torch.zeros_like(self.factor[0]) if self.rest is None else self.rest
        return LowRank(factor=self.factor, rest=rest + amount)

    def dense(self) -> Tensor:
        """The matrix itself.

        Returns:
            A new tensor, [in, in].
        """
        matrix = self.factor.T @ self.factor
        if self.rest is not None:
            matrix.diagonal().add_(self.rest)
        return matrix


Matrix = Tensor | LowRank
"""A moment or a Hessian: [in, in], its diagonal [in], or of low rank."""


def dense(matrix: Matrix) -> Tensor:
    """A moment or Hessian as a tensor.

    Args:
        matrix: It.

    Returns:
        [in, in] or [in]; new if it was of low rank.
    """
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def tensors_of(matrix: Matrix) -> tuple[Tensor, ...]:
    """All that a moment or Hessian is made of.

    Args:
        matrix: It.

    Returns:
        Itself, or its parts.
    """
    return matrix.tensors if isinstance(matrix, LowRank) else (matrix,)


def pays(rank: int, size: int) -> bool:
    """Whether a factor takes less memory, and what is multiplied with it less time, than the upper half of its matrix.

    Args:
        rank: Rows of the factor.
        size: Inputs.

    Returns:
        Whether it does.
    """
    return 2 * rank <= size


def solves_sooner(rank: int, size: int) -> bool:
    """Whether a system of low rank is solved sooner with its factors than by forming it from them.

    With as many rows as inputs both take as long at three quarters; with the few of an adapter, only near all of them.
    `examples/benchmarks/speed.py --rows crossing` measures it.

    Args:
        rank: Rows of all its factors.
        size: Inputs.

    Returns:
        Whether it is.
    """
    return 4 * rank <= 3 * size


def total_of(parts: Sequence[Matrix]) -> Matrix:
    """The sum of moments, of low rank if all of them are and that still pays.

    Args:
        parts: At least one, of one shape and device.

    Returns:
        The sum.
    """
    low = [part for part in parts if isinstance(part, LowRank)]
    if len(low) == len(parts) and pays(sum(part.rank for part in low), len(parts[0])):
        rests = [part.rest for part in low if part.rest is not None]
        rest = torch.stack(rests).sum(0) if rests else None
        return LowRank(factor=torch.cat([part.factor for part in low]), rest=rest)
    total = dense(parts[0])
    for part in parts[1:]:
        total = total + dense(part)
    return total


@dataclass(frozen=True, kw_only=True)
class LowRankShrinkage(Transform):
    """`D N (N + lam H)^-1` where `N + lam H = diag(d) + W^T W` has few rows `W`, by Woodbury's identity.

    `(diag(d) + W^T W)^-1 = d^-1 - d^-1 W^T S^-1 W d^-1` with `S = I + W d^-1 W^T`, whose eigenvalues are 1 and more.

    Attributes:
        utility: `N`, or None for the identity.
        diagonal: `d` [in], positive.
        wide: `W` [rows, in].
        inner: Lower Cholesky factor of `S`, [rows, rows]; its data type is that in which rows are multiplied.
    """

    utility: LowRank | None
    diagonal: Tensor
    wide: Tensor
    inner: Tensor

    @override
    def __call__(self, rows: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        useful = rows.to(self.inner.dtype)
        useful = (useful if self.utility is None else self.utility(useful)) / self.diagonal
        wide = self.wide.to(useful.dtype)
        solved = torch.cholesky_solve(wide @ useful.T, self.inner)
        return (useful - (solved.T @ wide) / self.diagonal).to(rows.dtype)


def gram(
    wide: Float[Tensor, "w i"], inverse: Float[Tensor, " i"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "w w"]:
    """The lower half of `I + W diag(d)^-1 W^T`.

    Args:
        wide: `W` [rows, in].
        inverse: `d^-1` [in].
        dtype: Data type in which products are formed and summed.

    Returns:
        [rows, rows]; nothing above the diagonal blocks is meant to be read.
    """
    found = torch.eye(len(wide), dtype=dtype, device=wide.device)
    columns = len(inverse) if dtype == wide.dtype else BLOCK
    for left in range(0, len(inverse), columns):
        part = wide[:, left : left + columns].to(dtype)
        weighed = part * inverse[left : left + columns].to(dtype)
        for start in range(0, len(wide), BLOCK):
            stop = start + BLOCK
            found[start:stop, :stop] += weighed[start:stop] @ part[:stop].T
    return found
