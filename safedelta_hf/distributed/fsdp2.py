"""FSDP2: every rank holds some slices of each parameter, along its first dimension, as a `DTensor`."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Sharding
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from typing_extensions import override

from safedelta_hf.distributed.model import ParameterObserver, Shard, ShardedModel, fetched_by_hooks
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError


class FullyShardedModel(ShardedModel):
    """Parameters that `fully_shard` distributed; a rank reads and writes its own slices, and nothing is gathered.

    Args:
        model: The model.
        ranks: The processes that work on it.

    Raises:
        ConfigurationError: A parameter is distributed along another dimension than its first.
    """

    kind: ClassVar[str] = "FSDP2"
    collective: ClassVar[bool] = True

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._reshard()
        super().__init__(model, ranks)
        for name in self.all_names:
            _require_rows(name, self.live(name))
        self._share_tied()

    @override
    def device(self, name: str) -> torch.device:
        return self.read(name).device

    @override
    def shard(self, name: str) -> Shard:
        parameter = self._sharded(name)
        if not isinstance(parameter, DTensor) or Sharding(0) not in parameter.placements:
            return Shard.whole(parameter.shape)
        mesh = parameter.device_mesh
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
        group: dist.ProcessGroup = mesh.get_group(parameter.placements.index(Sharding(0)))
        start = offset[0] if shape[0] else parameter.shape[0]
        return Shard(start=start, stop=start + shape[0], size=parameter.shape[0], group=group)

    @override
    def read(self, name: str) -> Tensor:
        parameter = self._sharded(name).detach()
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    @override
    def write(self, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.read(name).copy_(value)

    @override
    @contextmanager
    def tracked_by(self, observer: ParameterObserver) -> Iterator[None]:
        self._reshard()  # a tied parameter that is gathered is another one in each of its places
        with fetched_by_hooks(self, observer):
            yield
        self._reshard()

    def _sharded(self, name: str) -> nn.Parameter:
        parameter = self.live(name)
        if not isinstance(parameter, DTensor):
            # The last group of layers stays gathered after a forward pass without a backward pass, and what is written
            # to it then is lost.
            self._reshard()
        return self.live(name)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()

    def _share_tied(self) -> None:
        """Let what computes with a tied parameter see what is written to it.

        Where a parameter is tied after it was sharded, as transformers does, each place has it anew. Of one whose rows
        cannot be shared out evenly each pads a copy of its own, and the parameter shows the last of them: an optimizer
        step, and whatever else is written, never reaches the others (https://github.com/pytorch/pytorch/issues/176076).
        """
        held: dict[nn.Parameter, list[FSDPParam]] = defaultdict(list)
        groups = {group for unit in self._units for group in unit._get_fsdp_state()._fsdp_param_groups}
        for one in (one for group in groups for one in group.fsdp_params):
            place = one._module_info
            held[getattr(place.module, place.param_name)].append(one)
        for places in held.values():
            if len(places) > 1:
                for one in places:
                    one.reset_sharded_param()  # type: ignore[no-untyped-call] # takes what was tied since, and may pad it
                for one in places:
                    one._sharded_param_data = places[-1]._sharded_param_data


def _require_rows(name: str, parameter: nn.Parameter) -> None:
    if not isinstance(parameter, DTensor):
        return
    sharded = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
    if sharded not in ([], [Sharding(0)]):
        raise ConfigurationError(
            f"{name}: it is distributed as {parameter.placements}; of FSDP2, sharding along the first dimension, "
            "replicated or not, is covered, and no tensor parallelism. Train without the callback, then use "
            "adjust_checkpoint on the saved model"
        )
