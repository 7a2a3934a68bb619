import pytest
import torch
from torch import nn

from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError


def test_weights_that_deepspeed_keeps_quantised_are_refused_by_name():
    model = nn.Linear(4, 3)
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
        parameter.ds_tensor = torch.zeros(2, dtype=torch.int8)
    assert open_model(model).kind == "ZeRO-3"
    model.weight.ds_tensor.ds_quant_scale = torch.ones(1)
    with pytest.raises(ConfigurationError, match="^weight: .*zero_quantized_nontrainable_weights"):
        open_model(model)
