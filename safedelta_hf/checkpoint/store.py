"""A fine-tuned model in files, adjusted into other files one weight at a time."""

from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.adjust.store import WeightStore, Written
from safedelta_hf.checkpoint.folder import CheckpointFolder
from safedelta_hf.checkpoint.pair import CheckpointPair
from safedelta_hf.deltas.dense import Delta, DenseDelta, require_finite
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.report.records import ParameterRecord
from safedelta_hf.weights.digest import digest
from safedelta_hf.weights.readers import refuse, require_unswapped


class _Held(NamedTuple):
    """The one weight that is under way.

    Attributes:
        name: Canonical name.
        tuned: Fine-tuned weight, in the dtype of its file.
        base: Base weight, in the dtype of the profile's model.
    """

    name: str
    tuned: Tensor
    base: Tensor


class CheckpointStore(WeightStore):
    """The parameters of a checkpoint: read from its shards, once, and written into those of another.

    Args:
        pair: Where the weights stand.
        header: What the profile of the base was made from.
        output: The folder that is written, opened.
        device: Where deltas are computed.
    """

    overwrites = False

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
        self._held: _Held | None = None

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nothing has to be undone: the output is not there before it is complete.
        if kind is None:
            self._keep_others()

    @override
    def is_tuned(self, name: str) -> bool:
        (_, tuned, base), expected = self._read(name), self._header.base[name]
        if digest(base) != expected:
            if digest(tuned) != expected:
                refuse(self._pair.base, name)
            return False
        if torch.equal(tuned, base.to(tuned.dtype)):
            return False  # be it in another dtype than when the profile was made
        require_finite(name, tuned)
        return True

    @override
    def is_dense(self, name: str) -> bool:
        return True

    @override
    def delta(self, name: str) -> DenseDelta:
        held = self._read(name)
        return DenseDelta(held.tuned.to(self._device), held.base)

    @override
    def write(self, name: str, delta: Delta) -> Written:
        assert isinstance(delta, DenseDelta), "the deltas of a checkpoint are dense"
        written = delta.rounded()
        for stored, value in self._pair.split(name, written.weight().contiguous()):
            self._output.write(stored, value)
        return Written(written)

    @override
    def require_base(self) -> None:
        require_unswapped(self._pair.base, self._header)

    @override
    def restore(self) -> None:
        """Do nothing: the fine-tuned weights are only read, and each of the output is written again as a whole."""

    @override
    def finish(self, record: ParameterRecord) -> None:
        held, stored, self._held = self._held, self._pair.stored[record.parameter], None
        if record.outcome == "unchanged" and held is not None and held.name == record.parameter and not stored.twins:
            for name, value in stored.split(held.tuned):
                self._output.write(name, value)
        self._output.keep(record, stored.names)

    def _read(self, name: str) -> _Held:
        if self._held is None or self._held.name != name:
            dtype = getattr(torch, self._header.dtypes[name])
            self._held = _Held(name, self._pair.read(name), self._pair.base.read(name).to(dtype))
        return self._held

    def _keep_others(self) -> None:
        for name, tensor in self._pair.others.items():
            if name not in self._output.finished:
                self._output.keep(_copied(name, tensor.shape), [name])


def _copied(name: str, shape: tuple[int, ...]) -> ParameterRecord:
    return ParameterRecord(
        parameter=name, shape=shape, outcome="kept", reason="no parameter of the profile's model; copied as tuned"
    )
