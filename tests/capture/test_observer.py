"""Every operation on a weight is told or refused, in whichever form it is written; nothing else is looked at."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from safedelta_hf import ProfileConfig, collect_profile
from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.observer import Observer, every_product_visible
from safedelta_hf.core.low_rank import dense
from safedelta_hf.profile.moments import MomentStorage
from tests.fixtures import architectures


def watched(*, names=("w", "b"), share=False):
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))
    collector = MomentCollector({"w": weight, "b": bias}, MomentStorage(), head=None, chosen=("w",), share=share)
    observer = Observer(collector, names)
    inputs = torch.randn(6, 4)
    observer.start_batch(1, 6, [inputs])
    observer.track(weight, "w")
    observer.track(bias, "b")
    return observer, collector, weight, bias, inputs


FORMS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "matmul": lambda x, w, b: x @ w.T + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t()),
    "transposed": lambda x, w, b: (w @ x.T).T + b,
    "batched": lambda x, w, b: F.linear(x.view(2, 3, 4), w, b),
    "einsum": lambda x, w, b: torch.einsum("ti,oi->to", x, w) + b,
    "copied": lambda x, w, b: F.linear(x, w.clone(), b.detach()),
    "negated": lambda x, w, b: F.linear(-x, -w, b),
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_map_has_one_moment_in_whichever_form_it_is_written(form):
    observer, collector, weight, bias, inputs = watched()
    with observer:
        outputs = FORMS[form](inputs, weight, bias)
    torch.testing.assert_close(outputs.reshape(6, 3), F.linear(inputs, weight, bias))
    totals = collector.take()
    assert set(totals) == {"w:linear", "b:bias"} and observer.unsupported == {}
    torch.testing.assert_close(totals["w:linear"], inputs.T @ inputs)
    assert totals["b:bias"].item() == 6


@torch.no_grad()
def test_parameters_that_are_not_followed_and_tensors_of_no_weight_tell_nothing():
    observer, collector, weight, bias, inputs = watched(names=())
    observer.track_when_loaded(weight, "w")
    with observer:
        F.linear(inputs, weight, bias).sort()
    assert collector.take() == {} and observer.unsupported == {}


@torch.no_grad()
def test_nothing_is_told_while_it_is_paused_and_all_is_after():
    observer, collector, weight, bias, inputs = watched()
    with observer:
        observer.pause()
        hidden = F.linear(inputs, weight)
        weight.sort()
        observer.resume()
        assert observer.unsupported == {} and collector.take() == {}
        assert observer._reader.is_data(hidden)
        F.linear(inputs, weight)
    assert set(collector.take()) == {"w:linear"}


@torch.no_grad()
def test_an_operation_that_is_not_read_is_named_with_every_weight_in_it():
    observer, collector, weight, bias, _ = watched()
    with observer:
        torch.cumsum(weight, 0)
        torch.atan2(weight, bias[:, None])
    assert set(observer.unsupported) == {"w", "b"} and collector.take() == {}
    assert "an operation that is not read, aten.cumsum" in observer.unsupported["w"]
    assert "aten.atan2" in observer.unsupported["b"]


@torch.no_grad()
def test_a_copy_that_is_overwritten_is_a_weight_no_longer():
    observer, collector, weight, _, inputs = watched()
    with observer:
        copy = weight.clone()
        copy.fill_(0)
        F.linear(inputs, copy)
    assert "a copy of it is overwritten, by aten.fill_" in observer.unsupported["w"] and collector.take() == {}


@torch.no_grad()
def test_copies_of_what_is_no_weight_are_told_where_inputs_are_shared(monkeypatch):
    for share in (True, False):
        observer, collector, weight, _, inputs = watched(share=share)
        copied = []
        if share:
            monkeypatch.setattr(collector.shared, "copied", lambda *pair, told=copied: told.append(pair))
        with observer:
            copy = inputs.to(torch.float64)
            weight.clone()
        assert [source is inputs and made is copy for source, made in copied] == [True] * share


@torch.no_grad()
def test_what_a_packed_layer_and_a_computed_weight_tell_ends_the_pause():
    observer, collector, weight, bias, inputs = watched()
    computed = torch.randn(3, 4)
    with observer:
        observer.pause()
        outputs = inputs @ torch.randn(4, 3)
        observer.packed_product("w", "b", inputs.view(2, 3, 4), outputs)
        assert observer._reader.is_data(outputs)
        observer.pause()
        observer.computed_weight("w", computed)
        F.linear(inputs, computed)
    totals = collector.take()
    torch.testing.assert_close(totals["w:linear"], 2 * inputs.T @ inputs)
    assert totals["b:bias"].item() == 6


at_once = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "get_experts_implementation"),
    reason="this transformers does not tell of experts on other ranks, so they are read one after another",
)


@at_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_read_at_once_where_that_shows_each_with_its_tokens(name, dtype):
    model = architectures.tiny_model(name).to(dtype)
    model.set_experts_implementation("grouped_mm")
    with every_product_visible(model):
        kept = {model.config._experts_implementation}
    assert (kept == {"eager"}) == (name == "gpt_oss" or dtype == torch.float64)


@at_once
def test_experts_of_a_width_that_torch_cannot_group_are_read_one_after_another():
    config = MixtralConfig(
        vocab_size=40, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = MixtralForCausalLM(config).eval()
    for dtype, way in ((torch.float32, "grouped_mm"), (torch.bfloat16, "eager")):  # 48 bytes, and 24
        with every_product_visible(model.to(dtype)):
            assert model.config._experts_implementation == way


def test_experts_that_are_read_at_once_have_the_moments_of_one_after_another():
    found = []
    for way in ("grouped_mm", "eager"):
        model = architectures.tiny_model("mixtral")
        model.set_experts_implementation(way)
        ids = torch.randint(0, model.config.vocab_size, (6, 9), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [{"input_ids": row, "labels": row} for row in ids]
        found.append(collect_profile(model, rows, config=ProfileConfig(holdout=0.0), progress=False))
    one, other = found
    assert one.uses == other.uses and one.header.skipped == other.header.skipped
    assert any("experts" in use.parameter for use in one.uses)
    for key in one.moments:
        assert one.moments[key].tokens == other.moments[key].tokens
        totals = [dense(profile.moments[key].total) for profile in found]
        torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_settings_of_torch_and_of_the_model_are_put_back_whatever_happens(enabled):
    model, before = architectures.tiny_model("mixtral"), torch.backends.mha.get_fastpath_enabled()
    model.set_experts_implementation("batched_mm")
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with pytest.raises(ZeroDivisionError), every_product_visible(model):
            assert not torch.backends.mha.get_fastpath_enabled()
            assert model.config._experts_implementation == "eager"
            raise ZeroDivisionError
        assert torch.backends.mha.get_fastpath_enabled() is enabled
        assert model.config._experts_implementation == "batched_mm"
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
