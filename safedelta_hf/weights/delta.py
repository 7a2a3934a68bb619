"""The delta of one parameter that this process holds whole."""

import torch
from torch import Tensor

from safedelta_hf.core.transform import Transform
from safedelta_hf.records import Role


class MatrixDelta:
    """A delta laid out as [rows, columns], one column for each input, and the statistics that rules ask of it.

    Args:
        delta: Delta in the shape of its parameter, float32.
        role: How the parameter meets its inputs.
    """

    def __init__(self, delta: Tensor, role: Role) -> None:
        self._shape = delta.shape
        self._is_transposed = role in (Role.CONV1D, Role.EMBEDDING)
        if role is Role.SCALE:
            self._matrix = delta[None, :]
        elif role is Role.BIAS:
            self._matrix = delta[:, None]
        else:
            self._matrix = delta.T if self._is_transposed else delta

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
