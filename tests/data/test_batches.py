"""Every sequence is read once, beside others of its length."""

import torch
from accelerate import cpu_offload
from torch import nn

from safedelta_hf.data.batches import input_device
from tests.distributed.test_offload import offloaded


def test_inputs_go_where_the_model_runs(tmp_path):
    model = offloaded("disk", tmp_path)
    assert next(model.parameters()).is_meta
    assert input_device(model) == torch.device("cpu")
    assert input_device(cpu_offload(nn.Linear(4, 4), execution_device="cuda:1")) == torch.device("cuda:1")
