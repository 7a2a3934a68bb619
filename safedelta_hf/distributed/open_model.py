"""Which backend holds a model."""

from collections.abc import Callable

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from safedelta_hf.distributed.fsdp1 import FlatShardedModel
from safedelta_hf.distributed.fsdp2 import FullyShardedModel
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.offload import OffloadedModel, is_offloaded
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.distributed.zero import MirroredModel, PartitionedModel
from safedelta_hf.errors import ConfigurationError

BACKENDS: tuple[tuple[Callable[[nn.Module], bool], type[ShardedModel]], ...] = (
    (lambda model: any(isinstance(module, FSDPModule) for module in model.modules()), FullyShardedModel),
    (lambda model: any(isinstance(m, FullyShardedDataParallel) for m in model.modules()), FlatShardedModel),
    (lambda model: any(hasattr(parameter, "ds_id") for parameter in model.parameters()), PartitionedModel),
    (lambda model: any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters()), MirroredModel),
    (is_offloaded, OffloadedModel),
)
"""How to tell a backend, and what holds its parameters; the first that fits, else they are whole."""


def open_model(model: nn.Module | ShardedModel) -> ShardedModel:
    """Find out how a model is held; all ranks of a run come here together.

    Args:
        model: As the Trainer passes it to callbacks; or one that is open, which is returned as it is.

    Returns:
        The model with what there is to know.

    Raises:
        ConfigurationError: It is distributed in a way that is not covered.
        RankError: That is so on another process.
    """
    if isinstance(model, ShardedModel):
        return model
    ranks = Ranks.of_run()
    with ranks.together():
        return _backend(model)(model, ranks)


def _backend(model: nn.Module) -> type[ShardedModel]:
    for fits, backend in BACKENDS:
        if fits(model):
            return backend
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
    empty = [name for name, parameter in model.named_parameters() if tuple(parameter.shape) == (0,)]
    if empty:
        raise ConfigurationError(
            f"{type(model).__name__}: {empty[0]} and {len(empty) - 1} other weights have the shape [0], as DeepSpeed "
            "ZeRO-3 leaves in place of what it partitions, and nothing here gathers them; open the model inside the "
            "run that partitioned it, or load it from a whole checkpoint (zero_to_fp32.py, or "
            "stage3_gather_16bit_weights_on_model_save)"
        )
    return ShardedModel
