"""How a program on several processes ends."""

import os
import sys

import torch.distributed as dist


def leave_together() -> None:
    """End all ranks once all are through, without the teardown of the interpreter.

    There threads of gloo and DeepSpeed abort the process now and then, long after all that is tested.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
