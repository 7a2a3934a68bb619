"""FSDP1 on two processes against one."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError
from tests.programs.tower import TOKENS, Block, Checks, Tower, passed, stepping

CPU = torch.device("cpu")


def sharded(model, **settings):
    settings = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "use_orig_params": True} | settings
    return FullyShardedDataParallel(model, device_id=CPU, **settings)


def flat_parameters_are_refused() -> None:
    try:
        open_model(sharded(Tower(), use_orig_params=False))
    except ConfigurationError as error:
        assert "use_orig_params" in str(error), error
        passed("use_orig_params", "refused")


def half_precision() -> None:
    """What is written in float32 is kept, and what the next forward pass computes with is that, rounded."""
    settings = {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)}
    model, twin = sharded(Tower(), **settings), Tower()
    checks = Checks("FSDP1", "bfloat16", model, twin, stepping(model))
    for seed in (1, 2):
        checks.write(seed)
        with torch.no_grad():
            model(TOKENS)
    checks.read("read_after_forward")
    with torch.no_grad():
        ours, theirs = model(TOKENS), sharded(twin, **settings)(TOKENS)
    assert torch.equal(ours, theirs)
    passed("bfloat16", "forward")


def main() -> None:
    dist.init_process_group("gloo")
    layouts = {
        "full": {"sharding_strategy": ShardingStrategy.FULL_SHARD},
        "one_unit": {"auto_wrap_policy": None},
        "gradients": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        "none": {"sharding_strategy": ShardingStrategy.NO_SHARD},
        "hybrid": {
            "sharding_strategy": ShardingStrategy.HYBRID_SHARD,
            "device_mesh": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")),
        },
    }
    for name, settings in layouts.items():
        model = sharded(Tower(), **settings)
        # Its state is whole by default; only moving that to the CPU fails where it is there already.
        Checks("FSDP1", name, model, Tower(), stepping(model)).all()
    half_precision()
    flat_parameters_are_refused()
    dist.barrier()


if __name__ == "__main__":
    main()
