"""A fine-tuned model that this process holds whole."""

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from safedelta_hf.errors import BaseWeightsError, NumericalError
from safedelta_hf.names import parameter_names
from safedelta_hf.records import ProfileHeader, Storage
from safedelta_hf.weights.base import BaseWeights, verified
from safedelta_hf.weights.delta import Delta, DenseDelta
from safedelta_hf.weights.fingerprint import digest
from safedelta_hf.weights.journal import Journal


class ModelStore:
    """The parameters of a model in memory, adjusted in place.

    Args:
        model: The fine-tuned model.
        base: Where the base weights are read.
        header: What the profile of that base was made from.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
    """

    def __init__(
        self, model: nn.Module, base: BaseWeights, header: ProfileHeader, workspace: Path | None = None
    ) -> None:
        self.architecture = type(model).__name__
        self.source = base.source
        self._parameters = {name: parameter for parameter, name in parameter_names(model).items()}
        self._base = base
        self._header = header
        self._journal = Journal(workspace)

    def __enter__(self) -> "ModelStore":
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def restore(self) -> None:
        """Put back every fine-tuned weight that was written over; each may be written again."""
        self._journal.restore()

    def is_tuned(self, name: str) -> bool:
        """Whether the fine-tuning moved a parameter.

        Args:
            name: Canonical parameter name.

        Returns:
            False if it still holds the base weight, be it in another dtype.

        Raises:
            BaseWeightsError: The base weight is missing, of another shape, or not the profile's.
            NumericalError: The fine-tuned weight holds NaN or Inf.
        """
        parameter, expected = self._parameters[name], self._header.base[name]
        if digest(parameter) == expected:
            return False
        weight = verified(self._base, name, self._header.dtypes[name], expected)
        if torch.equal(parameter.cpu(), weight.to("cpu", parameter.dtype)):
            return False  # the same weight, in another dtype than when the profile was made
        if weight.shape != parameter.shape:
            raise BaseWeightsError(
                f"{name}: {list(parameter.shape)} in the model, {list(weight.shape)} in the base; was the vocabulary "
                "resized after the profile was made?"
            )
        require_finite(name, parameter)
        return True

    def storage(self, name: str) -> Storage:
        """The kind of storage of a parameter's delta.

        Args:
            name: Canonical parameter name.

        Returns:
            Always the same: a model has both weights.
        """
        return Storage.DENSE

    def delta(self, name: str) -> DenseDelta:
        """The delta of a parameter.

        Args:
            name: Canonical parameter name.

        Returns:
            Tuned minus base, on the device of the model.
        """
        dtype = getattr(torch, self._header.dtypes[name])
        return DenseDelta(self._parameters[name], self._base.read(name).to(dtype))

    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        """Let the model carry what is kept of a delta.

        Args:
            name: Canonical parameter name.
            delta: From `delta`, adjusted.

        Returns:
            Nothing to say.
        """
        assert isinstance(delta, DenseDelta), "a model's deltas are dense"
        self._journal.replace(name, self._parameters[name], delta.weight())
        return ()


def require_finite(name: str, tensor: Tensor) -> None:
    """Stop at a diverged training.

    Args:
        name: Where the tensor stands.
        tensor: A fine-tuned tensor.

    Raises:
        NumericalError: It holds NaN or Inf.
    """
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"{name}: the fine-tuned weight holds NaN or Inf; the training has diverged")
