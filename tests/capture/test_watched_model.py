"""What is watched of a model is known before it reads, and what cannot be is named."""

import pytest
import torch

from safedelta_hf.errors import CaptureError, NumericalError
from tests.capture.test_reading import collect
from tests.fixtures import tiny


def test_nan_in_a_weight_names_it(llama, safety_rows):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        collect(llama, safety_rows)


def test_encoder_decoder_models_are_a_named_error(safety_rows):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(CaptureError, match="encoder-decoder"):
        collect(T5ForConditionalGeneration(config), safety_rows)
