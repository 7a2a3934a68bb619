"""The delta of one parameter, whatever form it is stored in, and the form that this process holds whole."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.curvature import Lost
from safedelta_hf.core.finite import is_finite
from safedelta_hf.core.rounding import round_columns
from safedelta_hf.core.transform import DeltaMatrix, Transform
from safedelta_hf.errors import NumericalError
from safedelta_hf.records.uses import MatrixView, Use

SMALLEST_FIGURE: Final = 1e-25
"""Below it, squares of float32 may have vanished from a sum."""

PIECE: Final = 1 << 18
"""Entries that are computed at a time on a CPU, one MiB of float32."""


class Delta(Protocol):
    """The delta of one parameter, as tuned and as adjusted so far. The tuned one is never changed in place."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the weights that carry it are kept in."""
        ...

    @property
    def tuned_energy(self) -> float:
        """Squared norm of tuned minus base, over all ranks."""
        ...

    @property
    def lost_energy(self) -> float:
        """Squared norm of tuned minus adjusted, over all ranks."""
        ...

    @property
    def is_factored(self) -> bool:
        """Whether the weights that carry it are its factors, and not the sum of it and a base."""
        return False

    def lost(self, carried: "Delta") -> Lost | None:
        """What is lost of the tuned delta, beside what is kept.

        Args:
            carried: What the weights carry of what is kept.

        Returns:
            The sums over all entries, those of the pieces taken in float32; None where they are not counted.
        """
        return None

    def matrix(self, use: Use) -> DeltaMatrix:
        """The adjusted delta as one use sees it.

        Args:
            use: The use.

        Returns:
            A view.
        """
        ...

    def transformed(self, use: Use, transform: Transform) -> "Delta":
        """The delta with a transform applied to its rows, as one use sees them.

        Args:
            use: Which rows.
            transform: The transform of the whole rows.

        Returns:
            A delta of the same weights that takes the place of this one, and may be this one.
        """
        ...

    def zero(self) -> "Delta":
        """The delta with nothing of it kept.

        Returns:
            A new delta of the same weights.
        """
        ...

    def rounded(self) -> "Delta":
        """What the data type of the weights holds of it, each entry rounded to the nearest.

        Returns:
            A delta of the same weights; they carry it exactly.
        """
        ...

    def rounded_along(self, factors: Iterable[tuple[Use, Tensor]]) -> "Delta":
        """The same, with the errors made up for in inputs that some uses see beside (`core.rounding`).

        Args:
            factors: Uses in their order, each with `R` [in, in], upper triangular, of its damped Hessian `R R^T`.

        Returns:
            A delta of the same weights, of which `rounded` changes nothing that these uses see.
        """
        ...


class DenseDelta(Delta):
    """A delta held as one tensor, in the shape of its parameter.

    Args:
        tuned: Fine-tuned weight, in the dtype of the model.
        base: Base weight of the same shape, on any device.

    Raises:
        NumericalError: Their difference is too large for float32.
    """

    def __init__(self, tuned: Tensor, base: Tensor) -> None:
        self._tuned = tuned.detach()
        self._base = base.detach().to(tuned)
        # Shared with every delta that is made of this one.
        self._delta = by_pieces(
            torch.float32, lambda tuned, base: tuned.float() - base.float(), self._tuned, self._base
        )
        if not is_finite(self._delta):
            raise NumericalError("tuned minus base is beyond float32; the training has diverged")
        self._adjusted: Tensor | None = self._delta
        self._weight: Tensor | None = None

    @property
    @override
    def device(self) -> torch.device:
        return self._tuned.device

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._tuned.dtype

    @property
    def values(self) -> Tensor:
        """What is kept of the delta, float32, in the shape of its parameter, contiguous."""
        if self._adjusted is None:
            assert self._weight is not None, "what is kept is what a weight carries"
            self._adjusted = by_pieces(
                torch.float32, lambda weight, base: weight.float() - base.float(), self._weight, self._base
            )
        return self._adjusted

    @property
    def base(self) -> Tensor:
        """Base weight, float32."""
        return self._base.to(torch.float32)

    @property
    @override
    def tuned_energy(self) -> float:
        return figure_of(_energy, self._delta)

    @property
    @override
    def lost_energy(self) -> float:
        return 0.0 if self.is_unadjusted else figure_of(_distance, self._delta, self.values)

    @override
    def lost(self, carried: Delta) -> Lost | None:
        if not isinstance(carried, DenseDelta):
            return None
        values = [self._delta, self.values] + ([] if carried is self else [carried.values])
        sums = [_lost(*pieces) for pieces in zip(*map(_pieces, values), strict=True)]
        kept, product, *rounded = torch.stack(sums).double().sum(0).tolist()
        return Lost(kept, product, sum(rounded))

    @property
    def is_whole(self) -> bool:
        """Whether all of it is kept."""
        return torch.equal(self.values, self._delta)

    @property
    def is_zero(self) -> bool:
        """Whether nothing of it is kept."""
        return not self.values.any()

    @override
    def matrix(self, use: Use) -> "DenseMatrix":
        return DenseMatrix(self.values, use.view)

    @override
    def transformed(self, use: Use, transform: Transform) -> "DenseDelta":
        if use.view.covers(self._delta.numel()):
            return self.keeping(self.matrix(use).transformed(transform))
        # Of a parameter with many uses, such as experts, one copy takes the changes of all.
        result = self.keeping(self._delta.clone()) if self.is_unadjusted else self
        result.matrix(use).replace(transform)
        return result

    @override
    def zero(self) -> "DenseDelta":
        return self.keeping(torch.zeros_like(self._delta))

    def keeping(self, values: Tensor) -> "DenseDelta":
        """The delta with something else kept of it.

        Args:
            values: What is kept, float32, in the shape of the parameter, contiguous.

        Returns:
            A new delta of the same weights.
        """
        result = copy.copy(self)
        result._adjusted, result._weight = values, None
        return result

    def adjusted_to(self, values: Tensor, uses: Sequence[Use]) -> "DenseDelta":
        """The delta with something else kept of it, where it is used.

        Args:
            values: What is kept, float32, in the shape of the parameter, contiguous.
            uses: How it is used. Entries that no use reaches keep their delta, as under every rule.

        Returns:
            A new delta of the same weights.
        """
        if any(use.view.covers(values.numel()) for use in uses):
            return self.keeping(values)
        kept = self.values.clone()
        for use in uses:
            as_strided(kept, use.view).copy_(as_strided(values, use.view))
        return self.keeping(kept)

    @override
    def rounded(self) -> "DenseDelta":
        return self if self._weight is not None else self.held_as(self.weight())

    @override
    def rounded_along(self, factors: Iterable[tuple[Use, Tensor]]) -> "DenseDelta":
        wanted = self.wanted()
        for use, factor in factors:
            round_rows_(wanted, use.view, self.dtype, factor)
        return self.keeping(wanted.sub_(self.base))

    def held_as(self, weight: Tensor) -> "DenseDelta":
        """The delta that a weight carries.

        Args:
            weight: In the data type and shape of the parameter.

        Returns:
            A new delta, whose `weight` this is.
        """
        result = copy.copy(self)
        result._adjusted, result._weight = None, weight  # figures alone ask for what it carries
        return result

    def wanted(self) -> Tensor:
        """The weight that would carry all of what is kept.

        Returns:
            A new tensor, float32, contiguous; that of the fine-tuned weight where the delta is kept.
        """
        return by_pieces(torch.float32, _wanted, self._tuned, self._base, self._delta, self.values)

    def weight(self) -> Tensor:
        """The weight that carries what is kept.

        Returns:
            A tensor in the dtype of the fine-tuned weight, each entry rounded to the nearest; bit-identical to tuned or
            base where the delta is kept or dropped whole.
        """
        if self._weight is not None:
            return self._weight
        return by_pieces(self.dtype, _nearest, self._tuned, self._base, self._delta, self.values)

    @property
    def is_unadjusted(self) -> bool:
        """Whether nothing was done to it yet, so that what is kept shares its memory."""
        return self._adjusted is self._delta


class DenseMatrix(DeltaMatrix):
    """A delta in the memory of this process, laid out as [rows, columns].

    Args:
        delta: Delta in the shape of its parameter, float32, contiguous.
        view: The matrix in it that is used.
    """

    def __init__(self, delta: Tensor, view: MatrixView) -> None:
        self._delta, self._view = delta, view
        self._matrix = as_strided(delta, view)

    @property
    @override
    def rows(self) -> int:
        return self._matrix.shape[0]

    @override
    def column_energy(self, transform: Transform | None = None) -> Tensor:
        rows = self._matrix if transform is None else self.applied(transform)
        return rows.square().sum(0)

    @override
    def inner(self, transform: Transform) -> float:
        return figure_of(transform.form, self._matrix)

    def transformed(self, transform: Transform) -> Tensor:
        """The transformed delta in the shape of its parameter.

        Args:
            transform: Applied to the rows.

        Returns:
            A new float32 tensor, contiguous.
        """
        result = self.applied(transform)
        if self._view.covers(self._delta.numel()):
            stored = result.T if self._view.has_inputs_first else result
            return stored.contiguous().view(self._delta.shape)
        changed = self._delta.clone()
        as_strided(changed, self._view).copy_(result)
        return changed

    def replace(self, transform: Transform) -> None:
        """Transform the delta in place, and no more of it than the view shows.

        Args:
            transform: Applied to the rows.
        """
        self._matrix.copy_(self.applied(transform))

    def applied(self, transform: Transform) -> Tensor:
        """The transformed rows.

        Args:
            transform: Applied to them.

        Returns:
            [rows, columns], a new tensor.
        """
        return transform(self._matrix)


def figure_of(figure: Callable[..., Tensor], *values: Tensor) -> float:
    """A figure of second degree, such as an energy or a quadratic loss, also where squares are beyond float32.

    Args:
        figure: Takes values to a scalar, and `c` times the values to `c^2` times that.
        values: float32, any shapes.

    Returns:
        The figure of the values.
    """
    found = float(figure(*values))
    if SMALLEST_FIGURE <= abs(found) < math.inf or not any(one.any() for one in values):
        return found
    scale = 2.0 ** math.frexp(max(float(one.abs().max()) for one in values))[1]
    return float(figure(*(one / scale for one in values))) * scale**2


def _energy(values: Tensor) -> Tensor:
    return torch.stack([piece.square().sum() for piece in _pieces(values)]).sum()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    pairs = zip(_pieces(one), _pieces(other), strict=True)
    return torch.stack([(left - right).square().sum() for left, right in pairs]).sum()


def _lost(tuned: Tensor, kept: Tensor, carried: Tensor | None = None) -> Tensor:
    lost = tuned - kept
    if carried is None:
        return torch.stack([kept.square().sum(), lost.mul_(kept).sum()])
    rounded = carried - kept
    return torch.stack([kept.square().sum(), lost.mul_(carried + rounded).sum(), rounded.square_().sum()])


def _wanted(tuned: Tensor, base: Tensor, delta: Tensor, adjusted: Tensor) -> Tensor:
    return torch.where(adjusted == delta, tuned.float(), base.float() + adjusted)


def _nearest(tuned: Tensor, base: Tensor, delta: Tensor, adjusted: Tensor) -> Tensor:
    return torch.where(adjusted == delta, tuned, (base.float() + adjusted).to(tuned.dtype))


def by_pieces(dtype: torch.dtype, compute: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Compute a tensor entry by entry, on a CPU a few rows at a time.

    What is made on the way then stays in the processor's cache, and takes no memory that the system has to clear.

    Args:
        dtype: Data type of the result.
        compute: Takes pieces of the values to that of the result, in any data type.
        values: Tensors of one shape, on one device.

    Returns:
        A new tensor, contiguous.
    """
    split = [_pieces(one) for one in values]
    if len(split[0]) == 1:
        return compute(*values).to(dtype).contiguous()
    result = torch.empty(values[0].shape, dtype=dtype, device=values[0].device)
    for target, *pieces in zip(_pieces(result), *split, strict=True):
        target.copy_(compute(*pieces))
    return result


def _pieces(values: Tensor) -> Sequence[Tensor]:
    if values.ndim == 0 or values.device.type != "cpu":
        return [values]
    return torch.split(values, max(PIECE // max(math.prod(values.shape[1:]), 1), 1))


def as_strided(values: Tensor, view: MatrixView) -> Tensor:
    """The matrix that a use reads.

    Args:
        values: One for each entry of the parameter, contiguous, any shape.
        view: Which of them.

    Returns:
        [rows, columns], in the same memory.
    """
    strides = (view.row_stride, view.column_stride)
    return values.view(-1).as_strided((view.rows, view.columns), strides, values.storage_offset() + view.start)


def round_rows_(weight: Tensor, view: MatrixView, dtype: torch.dtype, factor: Tensor) -> None:
    """Round a matrix in a weight in place, the error of each column fed into those after it.

    Args:
        weight: float32, contiguous, any shape.
        view: The matrix.
        dtype: What to round to.
        factor: `R` [columns, columns], upper triangular, of the damped Hessian `R R^T` of its inputs.
    """
    rows = as_strided(weight, view)
    rows.copy_(round_columns(rows, dtype, factor))


def require_finite(name: str, tensor: Tensor) -> None:
    """Stop at a diverged training.

    Args:
        name: Where the tensor stands.
        tensor: A fine-tuned tensor.

    Raises:
        NumericalError: It holds NaN or Inf.
    """
    if not is_finite(tensor):
        raise NumericalError(f"{name}: the fine-tuned weight holds NaN or Inf; the training has diverged")
