"""A fine-tuned model in memory, held by this process or by many."""

from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from safedelta_hf.adjust.store import WeightStore
from safedelta_hf.deltas.dense import Delta, DenseDelta, require_finite
from safedelta_hf.deltas.sharded import ShardedDelta
from safedelta_hf.distributed.open_model import HeldModel
from safedelta_hf.errors import BaseWeightsError
from safedelta_hf.modules.names import class_name
from safedelta_hf.modules.parametrised import parametrised_weights
from safedelta_hf.records import ProfileHeader, Storage
from safedelta_hf.weights.digest import held_digest
from safedelta_hf.weights.journal import Journal
from safedelta_hf.weights.readers import BaseWeights, verified


class ModelStore(WeightStore):
    """The parameters of a model in memory, adjusted in place, and the weights that it computes from some of them.

    Args:
        model: The fine-tuned model.
        base: Where the base weights are read.
        header: What the profile of that base was made from.
        workspace: Folder with room for a temporary copy of the changed weights; None for the system's default.
    """

    def __init__(
        self, model: nn.Module, base: BaseWeights, header: ProfileHeader, workspace: Path | None = None
    ) -> None:
        self.architecture = class_name(model)
        self.source = base.source
        self._held = HeldModel.of(model)
        computed = parametrised_weights(model) if header.parametrised else {}
        self._computed = {name: computed[name] for name in header.parametrised}
        self._moved: dict[str, tuple[str, ...]] = {}
        self._base = base
        self._header = header
        self._journal = Journal(workspace, self._held.ranks)

    @override
    def __enter__(self) -> Self:
        self._journal.__enter__()
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def restore(self) -> None:
        """Put back every fine-tuned weight that was written over; each may be written again."""
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
    def storage(self, name: str) -> Storage:
        is_whole = name in self._computed or self._held.holding.piece(name).is_whole
        return Storage.DENSE if is_whole else Storage.SHARDED

    @override
    def delta(self, name: str) -> DenseDelta | ShardedDelta:
        weight = self._computed.get(name)
        if weight is None:
            own, piece = self._held.parameter(name), self._held.holding.piece(name)
            delta = DenseDelta(own.read(), self._base_weight(name))
            if piece.is_whole:
                return delta
            return ShardedDelta(delta, self._held.holding.shape(name), piece, self._held.ranks)
        return DenseDelta(weight.computed(), weight.computed(self._base_originals(name)))

    @override
    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        weight = self._computed.get(name)
        if weight is None:
            assert isinstance(delta, DenseDelta | ShardedDelta), "a model's deltas are dense"
            self._journal.replace(name, self._held.parameter(name), delta.weight())
            return ()
        assert isinstance(delta, DenseDelta), "a computed weight is whole"
        if delta.is_whole:
            return ("its originals are as tuned",)
        originals = self._base_originals(name) if delta.is_dropped else weight.inverted(delta.weight())
        for original, value in originals.items():
            self._journal.replace(original, self._held.parameter(original), value)
        remark = "are those of the base" if delta.is_dropped else f"were set by {weight.kind}"
        return (f"its originals {remark}",)

    def _base_weight(self, name: str) -> Tensor:
        weight = self._base.read(name, self._held.holding.piece(name))
        return weight.to(getattr(torch, self._header.dtypes[name]))

    def _base_originals(self, name: str) -> dict[str, Tensor]:
        # The others hold the base's already, and may be frozen, so that no copy of them was kept.
        return {original: self._base_weight(original) for original in self._moved[name]}

    def _is_moved(self, name: str) -> bool:
        expected = self._header.base[name]
        if held_digest(self._held, name) == expected:
            return False
        weight = verified(self._base, name, self._header.dtypes[name], expected, self._held)
        own = self._held.holding.read(name)
        if self._held.ranks.all(torch.equal(own.cpu(), weight.to("cpu", own.dtype))):
            return False  # the same weight, in another dtype than when the profile was made
        if weight.shape != own.shape:
            raise BaseWeightsError(
                f"{name}: {list(own.shape)} in the model, {list(weight.shape)} in the base; was the vocabulary "
                "resized after the profile was made?"
            )
        require_finite(name, own)
        return True
