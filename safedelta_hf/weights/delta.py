"""The delta of one parameter, whatever form it is stored in, and the form that this process holds whole."""

from typing import Protocol

import torch
from torch import Tensor

from safedelta_hf.core.transform import Transform
from safedelta_hf.records import Role, Use

TRANSPOSED_ROLES = (Role.CONV1D, Role.EMBEDDING)
"""Roles whose parameter is stored with its inputs first."""


class DeltaMatrix(Protocol):
    """A delta as one use of its parameter sees it: [rows, columns], one column for each input."""

    @property
    def rows(self) -> int:
        """Number of outputs that each input feeds."""
        ...

    @property
    def columns(self) -> int:
        """Number of inputs."""
        ...

    def column_energy(self, transform: Transform | None = None) -> Tensor:
        """Sum over rows of the squared (transformed) delta, [columns] float32."""
        ...

    def inner(self, transform: Transform) -> float:
        """Inner product of the delta with its transform."""
        ...


class Delta(Protocol):
    """The delta of one parameter, as tuned and as adjusted so far. Never changed in place."""

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    @property
    def tuned_energy(self) -> float:
        """Squared norm of tuned minus base."""
        ...

    @property
    def lost_energy(self) -> float:
        """Squared norm of tuned minus adjusted."""
        ...

    def matrix(self, use: Use) -> DeltaMatrix:
        """The adjusted delta as one use sees it."""
        ...

    def transformed(self, use: Use, transform: Transform) -> "Delta":
        """The delta with a transform applied to its rows, as one use sees them."""
        ...

    def dropped(self) -> "Delta":
        """The delta with nothing of it kept."""
        ...


class DenseDelta:
    """A delta held as one tensor, in the shape of its parameter.

    Args:
        tuned: Fine-tuned weight, in the dtype of the model.
        base: Base weight of the same shape, on any device.
        adjusted: What is kept of the delta, float32; None for all of it.
    """

    def __init__(self, tuned: Tensor, base: Tensor, adjusted: Tensor | None = None) -> None:
        self._tuned = tuned.detach()
        self._base = base.detach().to(tuned)
        self._adjusted = self._delta() if adjusted is None else adjusted

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._tuned.device

    @property
    def values(self) -> Tensor:
        """What is kept of the delta, float32, in the shape of its parameter."""
        return self._adjusted

    @property
    def tuned_energy(self) -> float:
        """Squared norm of tuned minus base."""
        return float(self._delta().square().sum())

    @property
    def lost_energy(self) -> float:
        """Squared norm of tuned minus adjusted."""
        return float((self._delta() - self._adjusted).square().sum())

    def matrix(self, use: Use) -> "MatrixDelta":
        """The adjusted delta as one use sees it.

        Args:
            use: The use.

        Returns:
            A view.
        """
        return MatrixDelta(self._adjusted, use.role)

    def transformed(self, use: Use, transform: Transform) -> "DenseDelta":
        """The delta with a transform applied to its rows.

        Args:
            use: Which rows.
            transform: The transform.

        Returns:
            A new delta of the same weights.
        """
        return DenseDelta(self._tuned, self._base, self.matrix(use).transformed(transform))

    def dropped(self) -> "DenseDelta":
        """The delta with nothing of it kept.

        Returns:
            A new delta of the same weights.
        """
        return DenseDelta(self._tuned, self._base, torch.zeros_like(self._adjusted))

    def weight(self) -> Tensor:
        """The weight that carries what is kept.

        Returns:
            A new tensor in the dtype of the fine-tuned weight.
        """
        return recombine(self._tuned, self._base, self._delta(), self._adjusted)

    def _delta(self) -> Tensor:
        return self._tuned.to(torch.float32) - self._base.to(torch.float32)


class MatrixDelta:
    """A delta laid out as [rows, columns], one column for each input, and the statistics that rules ask of it.

    Args:
        delta: Delta in the shape of its parameter, float32.
        role: How the parameter meets its inputs.
    """

    def __init__(self, delta: Tensor, role: Role) -> None:
        self._shape = delta.shape
        self._is_transposed = role in TRANSPOSED_ROLES
        if role is Role.SCALE:
            self._matrix = delta[None, :]
        elif role is Role.BIAS:
            self._matrix = delta[:, None]
        else:
            self._matrix = delta.T if self._is_transposed else delta.flatten(1)

    @property
    def rows(self) -> int:
        """Number of outputs that each input feeds."""
        return self._matrix.shape[0]

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self._matrix.shape[1]

    def column_energy(self, transform: Transform | None = None) -> Tensor:
        """Sum over rows of the squared (transformed) delta.

        Args:
            transform: Applied to the rows first.

        Returns:
            [columns] float32.
        """
        rows = self._matrix if transform is None else transform(self._matrix)
        return rows.square().sum(0)

    def inner(self, transform: Transform) -> float:
        """Inner product of the delta with its transform; with a Hessian as the transform, twice the quadratic loss.

        Args:
            transform: Applied to the rows.

        Returns:
            The sum over all entries.
        """
        return float((self._matrix * transform(self._matrix)).sum())

    def transformed(self, transform: Transform) -> Tensor:
        """The transformed delta in the shape of its parameter.

        Args:
            transform: Applied to the rows.

        Returns:
            A new float32 tensor.
        """
        result = transform(self._matrix)
        return (result.T if self._is_transposed else result).reshape(self._shape)


def recombine(tuned: Tensor, base: Tensor, delta: Tensor, adjusted: Tensor) -> Tensor:
    """Weight that carries an adjusted delta; bit-identical to tuned or base where the delta is kept or dropped whole.

    Args:
        tuned: Fine-tuned weight, in the dtype of the model.
        base: Base weight on the same device.
        delta: Tuned minus base, float32.
        adjusted: What is kept of it, float32.

    Returns:
        A new tensor in the dtype of the fine-tuned weight.
    """
    return torch.where(adjusted == delta, tuned, (base.to(torch.float32) + adjusted).to(tuned.dtype))
