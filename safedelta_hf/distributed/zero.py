"""DeepSpeed's ZeRO: stages 1 and 2 share out the optimizer and its master weights, stage 3 the parameters as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safedelta_hf.distributed.fetching_hooks import fetched_by_hooks
from safedelta_hf.distributed.model import Piece, Watcher, WholeParameters
from safedelta_hf.errors import ConfigurationError


class MirroredParameters(WholeParameters):
    """ZeRO 1 and 2: whole parameters, and of each a master copy in float32 that is shared out among the ranks.

    The optimizer steps on the master and overwrites the parameter with it, so both are written. Where the parameter has
    16 bits, the master keeps what they cannot hold.

    Args:
        model: The model.
    """

    kind: ClassVar[str] = "ZeRO-1/2"

    def write(self, name: str, value: Tensor) -> None:
        """Replace a parameter, and this rank's part of its master copy.

        Args:
            name: Its name.
            value: Of its shape, the same on all ranks.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        super().write(name, value)
        safe_set_full_fp32_param(self.parameter(name), value)

    def lend(self, name: str, value: Tensor) -> None:
        """Replace a parameter for a while: the master copy, which may hold more digits, stays as it is.

        Args:
            name: Its name.
            value: Of its shape, the same on all ranks.
        """
        super().write(name, value)


class PartitionedParameters(WholeParameters):
    """ZeRO 3: each rank holds an equal part of each parameter laid flat, cut anywhere within a row.

    Reading gathers one parameter; writing does too, and broadcasts it from the first rank.

    Args:
        model: The model.

    Raises:
        ConfigurationError: DeepSpeed keeps frozen weights quantised.
    """

    kind: ClassVar[str] = "ZeRO-3"
    collective = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for name in self.names:
            # Gathered alone, such a parameter is a row of codes.
            if hasattr(getattr(self.parameter(name), "ds_tensor", None), "ds_quant_scale"):
                raise ConfigurationError(
                    f"{name}: DeepSpeed keeps it quantised (zero_quantized_nontrainable_weights), and its values "
                    "cannot be read; train without that setting"
                )

    def shape(self, name: str) -> torch.Size:
        """Shape of the whole parameter.

        Args:
            name: Its name.

        Returns:
            The shape.
        """
        parameter = self.parameter(name)
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    def piece(self, name: str) -> Piece:
        """What `read` returns.

        Args:
            name: Name of a parameter.

        Returns:
            All of it.
        """
        return Piece.whole(self.shape(name))

    def read(self, name: str) -> Tensor:
        """Gather a parameter.

        Args:
            name: Its name.

        Returns:
            A copy of it.
        """
        from deepspeed.runtime.zero import GatheredParameters

        parameter = self.parameter(name)
        with GatheredParameters([parameter]):
            return parameter.detach().clone()

    def write(self, name: str, value: Tensor) -> None:
        """Replace a parameter, and this rank's part of the optimizer's master copy if it is trained.

        Args:
            name: Its name.
            value: Of its shape, the same on all ranks.
        """
        from deepspeed.runtime.zero import GatheredParameters

        parameter = self.parameter(name)
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)
            if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                _write_master(parameter, value)

    def lend(self, name: str, value: Tensor) -> None:
        """Replace a parameter for a while: the master copy, which may hold more digits, stays as it is.

        Args:
            name: Its name.
            value: Of its shape, the same on all ranks.
        """
        from deepspeed.runtime.zero import GatheredParameters

        parameter = self.parameter(name)
        with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)

    @contextmanager
    def shown_to(self, watcher: Watcher) -> Iterator[None]:
        """Tell a watcher which tensors hold the gathered parameters while the model runs.

        Args:
            watcher: Who is told.

        Yields:
            Nothing.
        """
        with fetched_by_hooks(self._model, self._places, watcher):
            yield


def _write_master(parameter: Any, value: Tensor) -> None:  # noqa: ANN401 - with the attributes that DeepSpeed adds
    # safe_set_full_fp32_param fails where the entries cannot be shared out evenly: it leaves out the padding.
    from deepspeed import comm
    from deepspeed.utils import safe_set_local_fp32_param

    size, rank = parameter.ds_tensor.numel(), comm.get_rank(group=parameter.ds_process_group)
    own = value.flatten()[size * rank : size * (rank + 1)]
    safe_set_local_fp32_param(parameter, nn.functional.pad(own, (0, size - own.numel())))
