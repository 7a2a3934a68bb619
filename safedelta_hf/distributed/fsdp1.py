"""FSDP1: the parameters of a unit are laid end to end in a flat one, of which every rank has an equal part."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.distributed.fsdp._runtime_utils import _reshard
from typing_extensions import override

from safedelta_hf.distributed.model import ParameterObserver, Shard, ShardedModel
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError


class _Place(NamedTuple):
    """Where a parameter lies: in the flat parameter of a unit, the one of this number."""

    unit: FullyShardedDataParallel
    handle: FlatParamHandle
    number: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole parameter."""
        return self.handle.flat_param._shapes[self.number]

    @property
    def stride(self) -> tuple[int, ...]:
        """Its strides, which say in which order its entries are laid."""
        return self.handle.flat_param._strides[self.number]

    def own(self) -> tuple[int, Tensor]:
        """What this rank holds.

        Returns:
            The first of the entries laid flat, and their memory; empty where it holds none.
        """
        # Outside of the unit's own work, the data of the flat parameter is the part of this rank.
        memory = self.handle.flat_param.data
        info = self.handle.flat_param._shard_param_infos[self.number]
        if not info.in_shard:
            return 0, memory[:0]
        start, size, first = info.offset_in_shard, info.numel_in_shard, info.intra_param_start_idx
        assert start is not None and size is not None and first is not None
        return first, memory[start : start + size]


class FlatShardedModel(ShardedModel):
    """Parameters that `FullyShardedDataParallel` distributed, cut anywhere within a row.

    A rank's part is no set of slices, so that reading gathers the parameter: that one alone, with as much traffic as
    reducing it. Writing needs no traffic, because each rank keeps its own part of what it is given.
    `summon_full_params` would gather a whole unit for each of its parameters; called for an inner unit before the first
    forward pass, it takes that unit for the outermost, and training fails.

    Args:
        model: The model.
        ranks: The processes that work on it.

    Raises:
        ConfigurationError: The model has no parameters of its own, but flat ones, or is sharded in tensor parallel too.
    """

    kind: ClassVar[str] = "FSDP1"
    collective: ClassVar[bool] = True

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        self._units = FullyShardedDataParallel.fsdp_modules(model)
        flattened = {owner: place for unit in self._units for owner, place in _flattened(unit)}
        super().__init__(model, ranks)
        self._flattened = {
            name: flattened[place] for name in self.all_names if (place := self._places[name]) in flattened
        }
        for name in self.all_names:
            assert name in self._flattened or not _is_fsdp_flattened(self.live(name)), f"{name}: its unit is outside"

    @override
    def shape(self, name: str) -> torch.Size:
        place = self._flattened.get(name)
        return super().shape(name) if place is None else place.shape

    @override
    def device(self, name: str) -> torch.device:
        place = self._flattened.get(name)
        return super().device(name) if place is None else place.handle.device

    @override
    def shard(self, name: str) -> Shard:
        return Shard.whole(self.shape(name))

    @override
    def read(self, name: str) -> Tensor:
        place = self._flattened.get(name)
        if place is None:
            return super().read(name)
        first, values = place.own()
        if place.handle.uses_sharded_strategy:
            group = place.handle.process_group
            values = self.ranks.assembled(values.to(self.device(name)), first, place.shape.numel(), group)
        return values.as_strided(place.shape, place.stride)

    @override
    def write(self, name: str, value: Tensor) -> None:
        place = self._flattened.get(name)
        if place is None:
            super().write(name, value)
            return
        first, memory = place.own()
        laid = torch.empty(place.shape.numel(), dtype=value.dtype, device=value.device)
        laid.as_strided(place.shape, place.stride).copy_(value)
        with torch.no_grad():
            memory.copy_(laid[first : first + memory.numel()])
        _forget_gathered(place)

    @override
    @contextmanager
    def tracked_by(self, observer: ParameterObserver) -> Iterator[None]:
        # A unit gathers and frees within its own `forward`, around that of the module which it wraps.
        for name in self.all_names:
            if name not in self._flattened:
                observer.track(self.live(name), name)

        def away(*_: Any) -> None:  # noqa: ANN401
            observer.pause()

        def again(*_: Any) -> None:  # noqa: ANN401
            observer.resume()

        with ExitStack() as stack:
            for unit in self._units:
                show = self._shower(unit, observer)
                for handle in (
                    unit.register_forward_pre_hook(away),
                    unit.module.register_forward_pre_hook(show, prepend=True),
                    unit.module.register_forward_hook(away),
                    unit.register_forward_hook(again, prepend=True),
                ):
                    stack.callback(handle.remove)
            yield

    def _shower(self, unit: FullyShardedDataParallel, observer: ParameterObserver) -> Any:  # noqa: ANN401 - a hook
        names = [name for name, place in self._flattened.items() if place.unit is unit]

        def show(*_: Any) -> None:  # noqa: ANN401
            for name in names:
                observer.track(self.live(name), name)
            observer.resume()

        return show


def _flattened(unit: FullyShardedDataParallel) -> Iterator[tuple[tuple[nn.Module, str], _Place]]:
    handle = unit._handle
    if handle is None:  # a unit all of whose parameters belong to inner ones
        return
    _require_plain(handle, type(unit.module).__name__)
    places = {}
    for number, (key, module, _) in enumerate(handle.flat_param._param_infos):
        places[module, key] = _Place(unit, handle, number)
    yield from places.items()
    for shared in handle.flat_param._shared_param_infos:
        yield (shared.module, shared.param_name), places[shared.prim_module, shared.prim_param_name]


def _forget_gathered(place: _Place) -> None:
    # The outermost unit keeps what it gathered after a forward pass without a backward pass, and the next one would
    # compute with that. Before the first forward pass nothing has been gathered, nor is there where it could be.
    if place.unit._is_root is not None:
        _reshard(place.unit, place.handle, place.handle.uses_sharded_strategy)


def _require_plain(handle: FlatParamHandle, unit: str) -> None:
    if not handle._use_orig_params:
        raise ConfigurationError(
            f"{unit}: FSDP1 shows a flat parameter here, without names and shapes; train with "
            'fsdp_config={"use_orig_params": True}, accelerate\'s default (fsdp_use_orig_params in its file)'
        )
    if any(extension is not None for extension in handle.flat_param._param_extensions):
        raise ConfigurationError(
            f"{unit}: its weights are distributed by tensor parallelism within FSDP1; this is not covered. Train "
            "without the callback, then use adjust_checkpoint on the saved model"
        )
