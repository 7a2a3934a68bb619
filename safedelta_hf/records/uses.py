"""How parameters are used: the role of each, the matrix that it is in it, and the key of its moment."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class MatrixView:
    """A matrix [rows, columns] inside a flattened parameter: one row for each output, one column for each input.

    A single row or column has the strides of a contiguous matrix, so equal matrices are equal views.

    Attributes:
        start: Index of its first entry.
        rows: Number of outputs.
        columns: Number of inputs.
        row_stride: Steps from one row to the next.
        column_stride: Steps from one column to the next.
    """

    start: int = 0
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    def __post_init__(self) -> None:
        if self.columns == 1:
            object.__setattr__(self, "column_stride", 1)
        if self.rows == 1:
            object.__setattr__(self, "row_stride", self.columns)

    @classmethod
    def contiguous(cls, rows: int, columns: int, start: int = 0) -> "MatrixView":
        """A matrix whose rows follow one another.

        Args:
            rows: Number of outputs.
            columns: Number of inputs.
            start: Index of its first entry.

        Returns:
            The view.
        """
        return cls(start=start, rows=rows, columns=columns, row_stride=columns, column_stride=1)

    @property
    def transposed(self) -> "MatrixView":
        """The same entries with rows and columns exchanged."""
        return MatrixView(
            start=self.start,
            rows=self.columns,
            columns=self.rows,
            row_stride=self.column_stride,
            column_stride=self.row_stride,
        )

    @property
    def entries(self) -> int:
        """Number of its entries."""
        return self.rows * self.columns

    @property
    def has_inputs_first(self) -> bool:
        """Whether it is stored [columns, rows]."""
        return self.row_stride < self.column_stride

    def fits(self, entries: int) -> bool:
        """Whether it lies inside a parameter.

        Args:
            entries: Number of entries of the parameter.

        Returns:
            Whether it does.
        """
        last = self.start + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride
        return last < entries and self.entries <= entries

    def covers(self, entries: int) -> bool:
        """Whether it is all of a parameter.

        Args:
            entries: Number of entries of the parameter.

        Returns:
            Whether it is.
        """
        whole = MatrixView.contiguous(self.rows, self.columns)
        return self.entries == entries and self in (whole, MatrixView.contiguous(self.columns, self.rows).transposed)


class Role(StrEnum):
    """How a parameter meets its inputs: decides its curvature."""

    LINEAR = "linear"
    """`y = W x`, stored [out, in]; full curvature."""
    CONV1D = "conv1d"
    """`y = W^T x`, stored [in, out] as in GPT-2; full curvature."""
    HEAD = "head"
    """The output projection: linear, but often treated apart."""
    EMBEDDING = "embedding"
    """Stored [tokens, features]; one column of the delta for each token; diagonal curvature."""
    SCALE = "norm"
    """Elementwise scale, of a normalised input as a rule, of any shape; diagonal curvature."""
    BIAS = "bias"
    """Added to every output; the single column of a constant input."""
    OFFSET = "offset"
    """A table added entry by entry, of any shape, such as a bias for each position; diagonal curvature."""
    CONVOLUTION = "convolution"
    """A linear map of patches, stored [out, in, positions...]; full curvature over the patch."""

    @property
    def is_diagonal(self) -> bool:
        """Whether its inputs do not mix."""
        return self in (Role.EMBEDDING, Role.SCALE, Role.OFFSET, Role.BIAS)

    def view(self, shape: Sequence[int]) -> MatrixView:
        """The matrix that a parameter is in this role, where all of it is used.

        Args:
            shape: Shape of the parameter.

        Returns:
            The view.
        """
        entries = math.prod(shape)
        if self in (Role.SCALE, Role.OFFSET):
            return MatrixView.contiguous(1, entries)
        if self is Role.BIAS:
            return MatrixView.contiguous(entries, 1)
        stored = MatrixView.contiguous(math.prod(shape[:1]), math.prod(shape[1:]))
        return stored.transposed if self in (Role.CONV1D, Role.EMBEDDING) else stored


@dataclass(frozen=True, kw_only=True)
class Use:
    """One way in which a parameter is used in the forward pass.

    Attributes:
        parameter: Canonical name; for a tied weight that of its first appearance.
        role: How it meets its inputs.
        moment: Key of its moment; parameters that read the same tensor have the same key.
        view: The matrix that is used: all of the parameter, or a part of it, such as one expert of many.
        shape: Shape of the parameter; of a packed one [out, in].
    """

    parameter: str
    role: Role
    moment: str
    view: MatrixView
    shape: tuple[int, ...]

    @property
    def has_inputs_first(self) -> bool:
        """Whether its matrix is stored [columns, rows]; the strides of a single row or column do not tell."""
        return self.view.has_inputs_first or self.role is Role.CONV1D


def inputs_first(uses: Iterable[Use]) -> set[str]:
    """Which linear weights are stored with their inputs first.

    Args:
        uses: How parameters are used.

    Returns:
        Their names.
    """
    return {use.parameter for use in uses if use.has_inputs_first and not use.role.is_diagonal}


def moment_key(parameter: str, role: Role, view: MatrixView, shape: Sequence[int]) -> str:
    """The key that the moment of a use has if no other serves it; no other use of the model has it.

    Args:
        parameter: Canonical name.
        role: How it meets its inputs.
        view: The matrix that is used.
        shape: Shape of the parameter.

    Returns:
        The name, the view in brackets where it is not all of the parameter as the role lays it out, and the role. A
        view is the number of a slice along the first dimension ("[3]", or "[3.T]" where the slice holds the transpose),
        or the place and size of some other matrix, with its steps unless its rows follow one another.
    """
    return f"{parameter}{'' if view == role.view(shape) else f'[{_text_of(view, shape)}]'}:{role}"


def _text_of(view: MatrixView, shape: Sequence[int]) -> str:
    if len(shape) == 3:
        size = shape[1] * shape[2]
        number = view.start // size
        stored = MatrixView.contiguous(shape[1], shape[2], number * size)
        if view in (stored, stored.transposed):
            return str(number) if view == stored else f"{number}.T"
    text = f"{view.start}+{view.rows}x{view.columns}"
    is_contiguous = view == MatrixView.contiguous(view.rows, view.columns, view.start)
    return text if is_contiguous else f"{text}@{view.row_stride},{view.column_stride}"
