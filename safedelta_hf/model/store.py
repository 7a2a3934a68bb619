"""A fine-tuned model in memory, held by this process or by many."""

from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.adjust.store import WeightStore, Written
from safedelta_hf.deltas.dense import Delta, DenseDelta, require_finite
from safedelta_hf.deltas.replicated import ReplicatedDelta
from safedelta_hf.deltas.sharded import ShardedDelta
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import BaseWeightsError
from safedelta_hf.modules.names import class_name
from safedelta_hf.modules.parametrised import parametrised_weights
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.report import Report
from safedelta_hf.report.saving import follow_saving
from safedelta_hf.weights.digest import parameter_digest
from safedelta_hf.weights.journal import Journal
from safedelta_hf.weights.readers import WeightReader, require_unswapped, verified


class ModelStore(WeightStore):
    """The parameters of a model in memory, adjusted in place, and the weights that it computes from some of them.

    Args:
        model: The fine-tuned model.
        base: Where the base weights are read.
        header: What the profile of that base was made from.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
    """

    def __init__(
        self, model: ShardedModel, base: WeightReader, header: ProfileHeader, workspace: Path | None = None
    ) -> None:
        self.architecture = class_name(model.model)
        self.source = base.source
        self.running = self._model = model
        computed = parametrised_weights(model.model) if header.parametrised else {}
        self._computed = {name: computed[name] for name in header.parametrised}
        self._moved: dict[str, tuple[str, ...]] = {}
        self._base = base
        self._header = header
        self._journal = Journal(workspace, model.ranks)

    def __enter__(self) -> "ModelStore":
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    @override
    def conclude(self, report: Report) -> None:
        follow_saving(self._model.model, report, writes=self._model.ranks.is_main)

    @override
    def restore(self) -> None:
        self._journal.restore()

    @override
    def is_tuned(self, name: str) -> bool:
        weight = self._computed.get(name)
        if weight is None:
            return self._is_moved(name)
        self._moved[name] = tuple(filter(self._is_moved, weight.originals))
        require_finite(name, weight.computed())
        return bool(self._moved[name])

    @override
    def require_base(self) -> None:
        require_unswapped(self._base, self._header, self._model)

    @override
    def is_dense(self, name: str) -> bool:
        return name in self._computed or self._model.shard(name).is_whole

    @override
    def delta(self, name: str) -> DenseDelta | ShardedDelta:
        weight = self._computed.get(name)
        if weight is None:
            model, shard = self._model, self._model.shard(name)
            if shard.is_whole:
                return ReplicatedDelta(model.read(name), self._base_weight(name), model.ranks)
            own = DenseDelta(model.read(name), self._base_weight(name))
            return ShardedDelta(own, model.shape(name), shard, model.ranks)
        return DenseDelta(weight.computed(), weight.computed(self._base_originals(name)))

    @override
    def write(self, name: str, delta: Delta) -> Written:
        weight = self._computed.get(name)
        if weight is None:
            assert isinstance(delta, DenseDelta | ShardedDelta), "a model's deltas are dense"
            written = delta.rounded()
            self._journal.replace(self._model.parameter(name), written.weight())
            return Written(written)
        assert isinstance(delta, DenseDelta), "a computed weight is whole"
        if delta.is_whole:
            return Written(delta, ("its originals are as tuned",))
        originals = self._base_originals(name) if delta.is_zero else weight.inverted(delta.weight())
        for original, value in originals.items():
            self._journal.replace(self._model.parameter(original), value)
        remark = "are those of the base" if delta.is_zero else f"were set by {weight.kind}"
        return Written(delta.held_as(weight.computed(originals)), (f"its originals {remark}",))

    def _base_weight(self, name: str) -> Tensor:
        weight = self._base.read(name, self._model.shard(name))
        return weight.to(getattr(torch, self._header.dtypes[name]))

    def _base_originals(self, name: str) -> dict[str, Tensor]:
        # The others hold the base's already, and may be frozen, so that no copy of them was kept.
        return {original: self._base_weight(original) for original in self._moved[name]}

    def _is_moved(self, name: str) -> bool:
        expected = self._header.base[name]
        if parameter_digest(self._model, name) == expected:
            return False
        weight = verified(self._base, name, self._header.dtypes[name], expected, self._model)
        own = self._model.read(name)
        if self._model.ranks.all(torch.equal(own.cpu(), weight.to("cpu", own.dtype))):
            return False  # the same weight, in another dtype than when the profile was made
        if weight.shape != own.shape:
            raise BaseWeightsError(
                f"{name}: {list(own.shape)} in the model, {list(weight.shape)} in the base; was the vocabulary "
                "resized after the profile was made?"
            )
        require_finite(name, own)
        return True
