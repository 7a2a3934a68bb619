"""FSDP2 on two processes against one."""

import sys

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError
from tests.programs.tower import Checks, Tower, passed, stepping


def sharded(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # As accelerate does with the last layers: they stay gathered after a forward pass, as the root does too.
    fully_shard(model.norm, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def tensor_parallelism_is_refused(folder: str) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))
    try:
        open_model(model)
    except ConfigurationError as error:
        assert "tensor parallelism" in str(error), error
        passed("tensor_parallelism", "refused")


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    meshes = {
        "two": init_device_mesh("cpu", (2,)),
        "replicated": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")),
        "replicated_once": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")),
    }
    for name, mesh in meshes.items():
        model = sharded(Tower(), mesh)
        Checks("FSDP2", name, model, Tower(), stepping(model)).all()
    tied = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))
    twin = LlamaForCausalLM.from_pretrained(folder)
    Checks("FSDP2", "by_transformers", tied, twin, stepping(tied)).all()
    tensor_parallelism_is_refused(folder)
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
