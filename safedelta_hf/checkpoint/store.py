"""A fine-tuned model in files, adjusted into other files one weight at a time."""

from types import TracebackType

import torch

from safedelta_hf.checkpoint.folder import CheckpointFolder
from safedelta_hf.checkpoint.pair import CheckpointPair
from safedelta_hf.deltas.dense import Delta, DenseDelta, require_finite
from safedelta_hf.records import ParameterRecord, ProfileHeader, Storage
from safedelta_hf.weights.digest import digest
from safedelta_hf.weights.readers import verified


class CheckpointStore:
    """The parameters of a checkpoint: read from its shards, and written into those of another.

    Args:
        pair: Where the weights stand.
        header: What the profile of the base was made from.
        output: The folder that is written, opened.
        device: Where deltas are computed.
    """

    def __init__(
        self,
        pair: CheckpointPair,
        header: ProfileHeader,
        output: CheckpointFolder,
        device: torch.device,
    ) -> None:
        self.architecture = header.architecture
        self.source = pair.base.source
        self._pair, self._header = pair, header
        self._output = output
        self._device = device

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing has to be undone: the output is not there before it is complete.
        if kind is None:
            self._keep_others()

    def is_tuned(self, name: str) -> bool:
        """Whether the fine-tuning moved a parameter.

        Args:
            name: Canonical parameter name.

        Returns:
            False if it still holds the base weight, be it in another dtype.

        Raises:
            BaseWeightsError: The base weight is missing, or not the profile's.
            CheckpointError: A file cannot be read.
            NumericalError: The fine-tuned weight holds NaN or Inf.
        """  # noqa: DOC502 - raised by the functions called
        tuned, expected = self._pair.read(name), self._header.base[name]
        if digest(tuned) == expected:
            return False
        weight = verified(self._pair.base, name, self._header.dtypes[name], expected)
        if torch.equal(tuned, weight.to(tuned.dtype)):
            return False  # the same weight, in another dtype than when the profile was made
        require_finite(name, tuned)
        return True

    def storage(self, name: str) -> Storage:
        """The kind of storage of a parameter's delta.

        Args:
            name: Canonical parameter name.

        Returns:
            Always the same: both checkpoints have the weight.
        """
        return Storage.DENSE

    def delta(self, name: str) -> DenseDelta:
        """The delta of a parameter.

        Args:
            name: Canonical name; `is_tuned` has looked at it.

        Returns:
            Tuned minus base.
        """
        base = self._pair.base.read(name).to(getattr(torch, self._header.dtypes[name]))
        return DenseDelta(self._pair.read(name).to(self._device), base)

    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        """Write the weight that carries what is kept of a delta.

        Args:
            name: Canonical name.
            delta: From `delta`, adjusted.

        Returns:
            Nothing to say.
        """
        assert isinstance(delta, DenseDelta), "the deltas of a checkpoint are dense"
        for stored, value in self._pair.parts(name, delta.weight().contiguous()):
            self._output.write(stored, value)
        return ()

    def keep(self, record: ParameterRecord) -> None:
        """Have a parameter stand finished in the output, however it fared.

        Args:
            record: What was done with it.
        """
        self._output.keep(record, self._pair.stored[record.parameter].names)

    def _keep_others(self) -> None:
        for name, tensor in self._pair.others.items():
            if name not in self._output.finished:
                self._output.keep(_copied(name, tensor.shape), [name])


def _copied(name: str, shape: tuple[int, ...]) -> ParameterRecord:
    return ParameterRecord(
        parameter=name, shape=shape, outcome="kept", reason="no parameter of the profile's model; copied as tuned"
    )
