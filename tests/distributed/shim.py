"""Lets accelerate take CPU processes for GPUs, so that its FSDP and DeepSpeed paths run where there is none."""

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
