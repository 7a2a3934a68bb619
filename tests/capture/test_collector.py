"""Moments are the sums of what was told; the same inputs count once, and only the same ones do."""

import pytest
import torch
from torch import nn

from safedelta_hf.errors import CaptureError
from tests.capture.test_reading import collect, moment_of
from tests.fixtures import tiny


def test_layers_that_read_the_same_tensor_share_one_moment(llama, safety_rows):
    profile = collect(llama, safety_rows)
    keys = {use.parameter.removeprefix("model.layers.0."): use.moment for use in profile.uses}
    assert keys["self_attn.q_proj.weight"] == keys["self_attn.k_proj.weight"] == keys["self_attn.v_proj.weight"]
    assert keys["mlp.gate_proj.weight"] == keys["mlp.up_proj.weight"]
    assert len({keys[f"{name}.weight"] for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}) == 3


def test_sharing_changes_no_moment(llama, safety_rows):
    shared, apart = collect(llama, safety_rows), collect(llama, safety_rows, share_moments=False)
    assert len(shared.moments) < len(apart.moments)
    for use in shared.uses:
        torch.testing.assert_close(
            shared.moments[use.moment].total, moment_of(apart, use.parameter, use.role).total, rtol=1e-5, atol=1e-6
        )


def test_a_layer_that_stops_sharing_is_an_error_not_a_wrong_moment(safety_rows):
    class Fickle(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.twin = nn.Linear(8, 16)
            self.calls = 0

        def forward(self, input_ids):
            self.calls += 1
            hidden = self.embed(input_ids)
            twin = self.twin(hidden if self.calls == 1 else hidden.clone())
            return self.down(self.up(hidden) + twin)

    with pytest.raises(CaptureError, match="share_moments=False"):
        collect(Fickle(), safety_rows)
    assert len(collect(Fickle(), safety_rows, share_moments=False).moments) == 7
