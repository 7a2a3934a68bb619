"""A model that is read for inspection is left as it was, whatever happens."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.modules.evaluating import (
    coarsest,
    evaluating,
    in_own_precision,
    precision_seen,
    rounding_otherwise,
    without_adapters,
)
from tests.fixtures import tiny
from tests.hf.test_precision import NUMBER, ROWS, sharp, trained


def test_what_accelerate_put_in_place_of_forward_is_put_back(tmp_path):
    model = sharp()
    trainer = trained(model, SafeDeltaCallback(ROWS, NUMBER), tmp_path, "bf16")
    ids = {"input_ids": torch.arange(3, 11)[None]}
    wrapped = vars(model)["forward"]
    with torch.no_grad():
        cast = model.eval()(**ids).logits
        exact = tiny.llama()
        exact.load_state_dict(model.state_dict())
        exact = exact(**ids).logits
        with pytest.raises(ZeroDivisionError), evaluating(model):
            assert torch.equal(model(**ids).logits, exact)
            raise ZeroDivisionError
        assert vars(model)["forward"] is wrapped
        assert torch.equal(model(**ids).logits, cast) and not torch.equal(cast, exact)
    assert type(trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)) is type(model)


def noisy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    model[2].eval()
    model[2][1].train()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_flags_gradients_and_random_numbers_are_as_before(fails):
    model, inputs = noisy(), torch.randn(3, 4)
    flags = [module.training for module in model.modules()]
    expected = copy.deepcopy(model).eval()(inputs)
    random_state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), evaluating(model):
        assert not any(module.training for module in model.modules())
        outputs = model(inputs)
        assert outputs.equal(expected) and not outputs.requires_grad
        torch.rand(7)
        if fails:
            raise ZeroDivisionError
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled() and torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize("fails", [False, True])
def test_autocast_around_it_is_off_inside_and_on_again_after(fails):
    model, inputs = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), evaluating(model):
            assert not torch.is_autocast_enabled("cpu") and model(inputs).dtype == torch.float32
            if fails:
                raise ZeroDivisionError
        assert torch.is_autocast_enabled("cpu") and model(inputs).dtype == torch.bfloat16


def test_weights_of_several_types_keep_the_cast_that_lets_them_run():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16), in_own_precision(model):
        assert torch.is_autocast_enabled("cpu") and model(torch.randn(3, 4)).dtype == torch.bfloat16


def test_a_forward_that_nobody_wrapped_is_left_alone():
    model = nn.Linear(4, 4)
    own = vars(model)["forward"] = lambda inputs: inputs + 1
    with in_own_precision(model):
        assert vars(model)["forward"] is own


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.disable_adapters = False
        self.trained, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

    def enable_adapters(self, enabled):
        self.disable_adapters = not enabled
        self.requires_grad_(enabled)


@pytest.mark.parametrize("fails", [False, True])
def test_adapters_are_off_inside_and_as_trainable_as_before_after(fails):
    model = nn.Sequential(Adapted(), Adapted())
    model[1].disable_adapters = True  # switched off by its owner
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), without_adapters(model):
        assert all(layer.disable_adapters for layer in model)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        if fails:
            raise ZeroDivisionError
    assert [layer.disable_adapters for layer in model] == [False, True]
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def hooks_of(model):
    return [len(module._forward_hooks) for module in model.modules()]


def test_the_types_that_layers_compute_in_are_seen_and_the_coarsest_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with precision_seen(model) as seen:
        assert not seen
        model(torch.randn(3, 4))
        assert seen == {torch.float32}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(torch.randn(3, 4))
    assert seen == {torch.float32, torch.bfloat16} and hooks_of(model) == [0] * 4
    assert coarsest(seen) == torch.bfloat16 and coarsest({torch.float16, torch.float32}) == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_embedded_number_moves_to_a_neighbour_of_it_and_back_again(dtype):
    model, ids = nn.Embedding(20, 8).to(dtype), torch.arange(20)
    exact = model(ids)
    with rounding_otherwise(model, dtype) as has_embeddings:
        assert has_embeddings
        moved = model(ids)
        assert moved.equal(model(ids))
    steps = (moved.double() - exact.double()).abs() / exact.double().abs()
    assert moved.dtype == dtype and (steps <= torch.finfo(dtype).eps).all() and (steps > 0).double().mean() > 0.3
    assert model(ids).equal(exact)
    with rounding_otherwise(nn.Linear(2, 2), dtype) as has_embeddings:
        assert not has_embeddings
