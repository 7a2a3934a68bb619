"""Which backend holds a model."""

from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.sharding.fsdp1 import FlatShardedParameters
from safedelta_hf.sharding.fsdp2 import FullyShardedParameters
from safedelta_hf.sharding.holding import Holding
from safedelta_hf.sharding.offload_hooks import is_offloaded
from safedelta_hf.sharding.offloaded import OffloadedParameters
from safedelta_hf.sharding.whole import WholeParameters
from safedelta_hf.sharding.zero import MirroredParameters, PartitionedParameters

BACKENDS: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Holding]], ...] = (
    (lambda model: any(isinstance(module, FSDPModule) for module in model.modules()), FullyShardedParameters),
    (lambda model: any(isinstance(m, FullyShardedDataParallel) for m in model.modules()), FlatShardedParameters),
    (lambda model: any(hasattr(parameter, "ds_id") for parameter in model.parameters()), PartitionedParameters),
    (lambda model: any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters()), MirroredParameters),
    (is_offloaded, OffloadedParameters),
)
"""How to tell a backend, and what holds its parameters; the first that fits, else they are whole."""


def holding_of(model: nn.Module) -> Holding:
    """How this process holds the parameters of a model.

    Args:
        model: As the Trainer passes it to callbacks.

    Returns:
        The holding.

    Raises:
        ConfigurationError: It is distributed in a way that is not covered.
    """
    for fits, holding in BACKENDS:
        if fits(model):
            return holding(model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigurationError(
            f"{type(model).__name__}: its weights are distributed by tensor parallelism (a tp_plan), where a rank "
            "holds slices of inputs or outputs; this is not covered. Train without the callback, then use "
            "adjust_checkpoint on the saved model"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            f"{type(model).__name__}: some of its weights are on the meta device, and nothing that is known "
            "keeps their values; load it with values"
        )
    return WholeParameters(model)
