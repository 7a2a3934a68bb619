"""Lets accelerate take CPU processes for GPUs, so that its FSDP and DeepSpeed paths run where there is none."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def install() -> None:
    """Call before anything of accelerate is made; training arguments keep `use_cpu=False`."""

    def backend(self: PartialState, *_: object, **__: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = backend
    PartialState.set_device = device


def deepspeed_on_cpu() -> None:
    """Call before anything imports DeepSpeed. It would compile an operator of its own for collectives otherwise."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
