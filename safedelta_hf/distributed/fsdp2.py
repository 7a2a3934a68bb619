"""FSDP2: every rank holds some slices of each parameter, along its first dimension, as a `DTensor`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from safedelta_hf.distributed.fetching_hooks import fetched_by_hooks
from safedelta_hf.distributed.model import Piece, Watcher, WholeParameters
from safedelta_hf.errors import ConfigurationError


class FullyShardedParameters(WholeParameters):
    """Parameters that `fully_shard` distributed; a rank reads and writes its own slices, and nothing is gathered.

    Args:
        model: The model.

    Raises:
        ConfigurationError: A parameter is distributed along another dimension than its first.
    """

    kind: ClassVar[str] = "FSDP2"
    collective = True

    def __init__(self, model: nn.Module) -> None:
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._reshard()
        super().__init__(model)
        for name in self.names:
            _require_rows(name, self.parameter(name))

    def device(self, name: str) -> torch.device:
        """Where this rank's slices are.

        Args:
            name: Name of a parameter.

        Returns:
            The device.
        """
        return self.read(name).device

    def piece(self, name: str) -> Piece:
        """This rank's slices of a parameter.

        Args:
            name: Its name.

        Returns:
            Where they lie in it.
        """
        parameter = self._sharded(name)
        if not isinstance(parameter, DTensor) or Shard(0) not in parameter.placements:
            return Piece.whole(parameter.shape)
        mesh = parameter.device_mesh
        shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
        group: dist.ProcessGroup = mesh.get_group(parameter.placements.index(Shard(0)))
        start = offset[0] if shape[0] else parameter.shape[0]
        return Piece(start=start, stop=start + shape[0], size=parameter.shape[0], group=group)

    def read(self, name: str) -> Tensor:
        """This rank's slices of a parameter.

        Args:
            name: Its name.

        Returns:
            Their own memory.
        """
        parameter = self._sharded(name).detach()
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def write(self, name: str, value: Tensor) -> None:
        """Replace this rank's slices.

        Args:
            name: Name of the parameter.
            value: Of their shape.
        """
        with torch.no_grad():
            self.read(name).copy_(value)

    @contextmanager
    def shown_to(self, watcher: Watcher) -> Iterator[None]:
        """Tell a watcher which tensors hold the gathered parameters while the model runs.

        Args:
            watcher: Who is told.

        Yields:
            Nothing.
        """
        self._reshard()  # a tied parameter that is gathered is another one in each of its places
        with fetched_by_hooks(self._model, self._places, watcher):
            yield
        self._reshard()

    def _sharded(self, name: str) -> nn.Parameter:
        parameter = self.parameter(name)
        if not isinstance(parameter, DTensor):
            # The last group of layers stays gathered after a forward pass without a backward pass, and what is written
            # to it then is lost.
            self._reshard()
        return self.parameter(name)

    def _reshard(self) -> None:
        for unit in self._units:
            unit.reshard()


def _require_rows(name: str, parameter: nn.Parameter) -> None:
    if not isinstance(parameter, DTensor):
        return
    sharded = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
    if sharded not in ([], [Shard(0)]):
        raise ConfigurationError(
            f"{name}: it is distributed as {parameter.placements}; of FSDP2, sharding along the first dimension, "
            "replicated or not, is covered, and no tensor parallelism. Train without the callback, then use "
            "adjust_checkpoint on the saved model"
        )
