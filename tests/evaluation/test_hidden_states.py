"""Against transformers' own hidden states, one prompt at a time."""

import pytest
import torch
from torch import nn

from safedelta_hf.errors import ArchitectureError, ConfigurationError
from safedelta_hf.evaluation.hidden_states import hidden_of, last_states, layer_range
from tests.fixtures import architectures, tiny

PROMPTS = [row["input_ids"] for row in tiny.rows(7, seed=8)]


def oracle(model, prompt, position):
    with torch.no_grad():
        states = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states
    return torch.stack([layer[0, position] for layer in states[1:]])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_states_are_those_of_each_prompt_alone_in_float64(batch_size):
    model = tiny.llama(num_hidden_layers=3).double()
    model.model.norm = nn.Identity()  # transformers shows the last layer's output after it
    found = last_states(model, PROMPTS, positions=(-3, -1), batch_size=batch_size)
    assert not any(module._forward_hooks for module in model.modules())
    expected = [torch.stack([oracle(model, prompt, place) for place in (-3, -1)]) for prompt in PROMPTS]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("key", ["gpt2", "gpt_neox", "mixtral", "gemma2", "falcon", "opt", "mpt", "jamba", "gpt_oss"])
def test_layers_may_return_tuples_or_tensors(key):
    model = architectures.tiny_model(key)
    states = last_states(model, PROMPTS)
    assert states.shape[:3] == (len(PROMPTS), 1, model.config.num_hidden_layers) and states.isfinite().all()


def test_half_precision_is_given_in_float32():
    assert last_states(tiny.llama().bfloat16(), PROMPTS).dtype == torch.float32


@pytest.mark.parametrize("output", [torch.zeros(4, 2), (), torch.zeros(2, 1, 3, 4), {"hidden": 1}])
def test_what_is_no_hidden_states_is_refused_by_the_name_of_the_layer(output):
    with pytest.raises(ArchitectureError, match="model.layers.3"):
        hidden_of(output, "model.layers.3")


def test_a_layer_that_runs_several_times_is_refused():
    model = tiny.llama()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ArchitectureError, match="ran 2 times"):
        last_states(model, PROMPTS)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_batch_holds_at_least_one_prompt():
    with pytest.raises(ConfigurationError, match="batch_size"):
        last_states(tiny.llama(), PROMPTS, batch_size=0)


@pytest.mark.parametrize(
    "count, expected", [(32, range(10, 20)), (4, range(1, 3)), (1, range(0, 1)), (80, range(25, 48))]
)
def test_depths_are_shares_of_the_layers(count, expected):
    assert layer_range(10 / 32, 19 / 32, count) == expected
