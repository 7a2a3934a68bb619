"""DeepSpeed's ZeRO: stages 1 and 2 share out the optimizer and its master weights, stage 3 the parameters as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from safedelta_hf.distributed.model import ParameterObserver, Shard, ShardedModel, fetched_by_hooks
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError


class MirroredModel(ShardedModel):
    """ZeRO 1 and 2: whole parameters, and of each a master copy in float32 that is shared out among the ranks.

    The optimizer steps on the master and overwrites the parameter with it, so both are written. Where the parameter has
    16 bits, the master keeps what they cannot hold.

    Args:
        model: The model.
    """

    kind: ClassVar[str] = "ZeRO-1/2"

    @override
    def write(self, name: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().write(name, value)
        safe_set_full_fp32_param(self.live(name), value)

    @override
    def lend(self, name: str, value: Tensor) -> None:
        super().write(name, value)


class PartitionedModel(ShardedModel):
    """ZeRO 3: each rank holds an equal part of each parameter laid flat, cut anywhere within a row.

    Reading gathers one parameter; writing does too, and broadcasts it from the first rank.

    Args:
        model: The model.
        ranks: The processes that work on it.

    Raises:
        ConfigurationError: DeepSpeed keeps frozen weights quantised.
    """

    kind: ClassVar[str] = "ZeRO-3"
    collective: ClassVar[bool] = True

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        super().__init__(model, ranks)
        for name in self.all_names:
            # Gathered alone, such a parameter is a row of codes.
            if hasattr(getattr(self.live(name), "ds_tensor", None), "ds_quant_scale"):
                raise ConfigurationError(
                    f"{name}: DeepSpeed keeps it quantised (zero_quantized_nontrainable_weights), and its values "
                    "cannot be read; train without that setting"
                )

    @override
    def shape(self, name: str) -> torch.Size:
        parameter = self.live(name)
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape))

    @override
    def shard(self, name: str) -> Shard:
        return Shard.whole(self.shape(name))

    @override
    def read(self, name: str) -> Tensor:
        with self._gathered(name) as parameter:
            return parameter.detach().clone()

    @override
    def write(self, name: str, value: Tensor) -> None:
        with self._gathered(name, modifier_rank=0) as parameter:
            parameter.copy_(value)
            if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                _write_master(parameter, value)

    @override
    def lend(self, name: str, value: Tensor) -> None:
        with self._gathered(name, modifier_rank=0) as parameter:
            parameter.copy_(value)

    @override
    @contextmanager
    def tracked_by(self, observer: ParameterObserver) -> Iterator[None]:
        with fetched_by_hooks(self, observer):
            yield

    @contextmanager
    def _gathered(self, name: str, modifier_rank: int | None = None) -> Iterator[nn.Parameter]:
        from deepspeed.runtime.zero import GatheredParameters

        self.ranks.check_in()  # within what DeepSpeed does, nobody hears of a rank that failed
        parameter = self.live(name)
        with GatheredParameters([parameter], modifier_rank=modifier_rank), torch.no_grad():
            yield parameter


def _write_master(parameter: Any, value: Tensor) -> None:  # noqa: ANN401 - with the attributes that DeepSpeed adds
    # safe_set_full_fp32_param fails where the entries cannot be shared out evenly: it leaves out the padding.
    from deepspeed import comm
    from deepspeed.utils import safe_set_local_fp32_param

    size, rank = parameter.ds_tensor.numel(), comm.get_rank(group=parameter.ds_process_group)
    own = value.flatten()[size * rank : size * (rank + 1)]
    safe_set_local_fp32_param(parameter, nn.functional.pad(own, (0, size - own.numel())))
