"""FSDP1 on two processes against one."""

from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.sharding.detect import holding_of
from tests.distributed.tower import RATE, TOKENS, Block, Checks, Tower, loss_of

CPU = torch.device("cpu")


def sharded(model, **settings):
    settings = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "use_orig_params": True} | settings
    return FullyShardedDataParallel(model, device_id=CPU, **settings)


def stepping(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(tokens) -> None:
        loss_of(model(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def said(what: str, name: str) -> None:
    if dist.get_rank() == 0:
        print(f"held {what}.{name}", flush=True)


def flat_parameters_are_refused() -> None:
    try:
        holding_of(sharded(Tower(), use_orig_params=False))
    except ConfigurationError as error:
        assert "use_orig_params" in str(error), error
        said("use_orig_params", "refused")


def half_precision() -> None:
    """What is written in float32 is what the next forward pass computes with, rounded to its precision."""
    model = sharded(Tower(), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    twin = Tower()
    checks = Checks("FSDP1", model, twin, model, stepping(model), partial(said, "bfloat16"), tolerance=0.05)
    checks.read("read")
    for seed in (1, 2):
        checks.write(seed)
        checks.agree("forward")
        checks.read("read_after_forward")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).float(), sharded_again(twin)(TOKENS).float())
    said("bfloat16", "as_if_trained_from_there")


def sharded_again(twin):
    return sharded(twin, mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))


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
        Checks("FSDP1", model, Tower(), model, stepping(model), partial(said, name)).all()
    half_precision()
    flat_parameters_are_refused()
    dist.barrier()


if __name__ == "__main__":
    main()
