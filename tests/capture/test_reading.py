import copy

import pytest
import torch
from torch import nn

from safedelta_hf import ProfileConfig, SafetyProfile, collect_profile
from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError, NumericalError
from safedelta_hf.records.uses import Role
from tests.fixtures import tiny


def collect(model, rows, **settings) -> SafetyProfile:
    return collect_profile(model, rows, progress=False, config=ProfileConfig(**{"holdout": 0.0} | settings))


def observed_inputs(model, module_name, rows):
    """Oracle: every sequence on its own, inputs of one module concatenated, float64."""
    seen = []
    module = model.get_submodule(module_name)
    handle = module.register_forward_hook(lambda _, args, out: seen.append(args[0].double().flatten(0, -2)))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    handle.remove()
    return torch.cat(seen)


def moment_of(profile, parameter, role=None):
    uses = [use for use in profile.uses if use.parameter == parameter and role in (None, use.role)]
    assert len(uses) == 1
    return profile.moments[uses[0].moment]


@pytest.mark.parametrize(
    "module",
    ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "lm_head"],
)
def test_linear_moments_equal_the_sum_over_single_sequences(llama, safety_rows, module):
    profile = collect(llama, safety_rows)
    inputs = observed_inputs(llama, module, safety_rows)
    expected = 2 / len(safety_rows) * inputs.T @ inputs
    found = moment_of(profile, f"{module}.weight")
    torch.testing.assert_close(found.hessian(torch.device("cpu")).double(), expected, rtol=1e-4, atol=1e-5)
    assert found.tokens == len(inputs) == sum(len(row["input_ids"]) for row in safety_rows)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.Plain])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_moments_do_not_depend_on_the_batch_size(make, safety_rows, batch_size):
    model = make()
    one, other = collect(model, safety_rows, batch_size=2), collect(model, safety_rows, batch_size=batch_size)
    assert set(one.moments) == set(other.moments)
    for key, moment in one.moments.items():
        torch.testing.assert_close(moment.total, other.moments[key].total, rtol=1e-4, atol=1e-4)
        assert moment.tokens == other.moments[key].tokens


def test_moments_do_not_depend_on_the_order_of_the_data(llama, safety_rows):
    one, other = collect(llama, safety_rows), collect(llama, safety_rows[::-1])
    for key, moment in one.moments.items():
        torch.testing.assert_close(moment.total, other.moments[key].total, rtol=1e-4, atol=1e-4)


def test_a_layer_called_twice_gets_both_inputs(safety_rows):
    class Twice(tiny.Plain):
        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            return self.down(self.up(hidden) + self.up(2 * hidden))

    plain, torch_twice = tiny.Plain(), Twice()
    torch_twice.load_state_dict(plain.state_dict())
    once, twice = collect(plain, safety_rows), collect(torch_twice, safety_rows)
    torch.testing.assert_close(
        moment_of(twice, "up.weight").total, 5 * moment_of(once, "up.weight").total, rtol=1e-4, atol=1e-3
    )
    assert moment_of(twice, "up.weight").tokens == 2 * moment_of(once, "up.weight").tokens


def test_embedding_moments_count_tokens(llama, safety_rows):
    counts = torch.bincount(torch.tensor(sum((row["input_ids"] for row in safety_rows), [])), minlength=tiny.VOCABULARY)
    assert torch.equal(moment_of(collect(llama, safety_rows), "model.embed_tokens.weight").total, counts.float())


def test_broadcast_position_embeddings_count_every_sequence(gpt2, safety_rows):
    counts = torch.zeros(32)
    for row in safety_rows:
        counts[: len(row["input_ids"])] += 1
    assert torch.equal(moment_of(collect(gpt2, safety_rows, batch_size=8), "transformer.wpe.weight").total, counts)


def test_norm_moments_are_squares_of_the_normalised_input(llama, safety_rows):
    with torch.no_grad():
        llama.model.norm.weight.uniform_(-2, 2)
        llama.model.norm.weight[3] = 0
    inputs = observed_inputs(llama, "model.norm", safety_rows)
    normalised = inputs / (inputs.square().mean(-1, keepdim=True) + llama.model.norm.variance_epsilon).sqrt()
    found = moment_of(collect(llama, safety_rows), "model.norm.weight").total
    torch.testing.assert_close(found.double(), normalised.square().sum(0), rtol=1e-4, atol=1e-4)


def test_layer_norm_moments_leave_the_bias_out(gpt2, safety_rows):
    with torch.no_grad():
        gpt2.transformer.ln_f.bias.fill_(3.0)
    inputs = observed_inputs(gpt2, "transformer.ln_f", safety_rows)
    normalised = nn.functional.layer_norm(inputs, (16,), eps=gpt2.transformer.ln_f.eps)
    found = moment_of(collect(gpt2, safety_rows), "transformer.ln_f.weight").total
    torch.testing.assert_close(found.double(), normalised.square().sum(0), rtol=1e-4, atol=1e-3)


def test_bias_moments_are_the_number_of_tokens(gpt2, safety_rows):
    tokens = sum(len(row["input_ids"]) for row in safety_rows)
    profile = collect(gpt2, safety_rows)
    for name in ("transformer.h.0.attn.c_attn.bias", "transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.bias"):
        assert moment_of(profile, name).total.tolist() == [tokens]


def test_tied_head_and_embedding_are_one_parameter_with_two_uses(safety_rows):
    profile = collect(tiny.llama(tied=True), safety_rows)
    uses = [use for use in profile.uses if use.parameter == "model.embed_tokens.weight"]
    assert {use.role for use in uses} == {Role.EMBEDDING, Role.HEAD}
    assert not any(use.parameter.startswith("lm_head") for use in profile.uses)
    assert {profile.moments[use.moment].total.shape for use in uses} == {(tiny.VOCABULARY,), (16, 16)}


def test_bfloat16_models_accumulate_in_float32(llama, safety_rows):
    full = collect(llama, safety_rows)
    half = collect(llama.bfloat16(), safety_rows)
    for use in full.uses:
        moment = half.moments[use.moment].total
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment, full.moments[use.moment].total, rtol=0.1, atol=0.5)


def test_layers_never_reached_and_unknown_modules_are_listed_with_the_reason(safety_rows):
    class Odd(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(2))

    skipped = collect(Odd(), safety_rows).header.skipped
    assert set(skipped) == {"spare.weight", "spare.bias", "scale"}
    assert "never reached" in skipped["spare.weight"] and "Odd" in skipped["scale"]


class Curved(tiny.Plain):
    """A weight that meets its inputs through a function of it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.curve = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, input_ids):
        return self.down(torch.relu(self.up(self.embed(input_ids) * self.function(self.curve))))


def test_weights_that_are_no_scale_are_listed_not_guessed(safety_rows):
    profile = collect(Curved(lambda weight: weight.softmax(0)), safety_rows)
    assert "aten._softmax" in profile.header.skipped["curve"]


def test_an_elementwise_function_of_a_weight_counts_with_its_slope(safety_rows):
    model = Curved(lambda weight: -torch.exp(2 * weight))
    found = moment_of(collect(model, safety_rows), "curve").total
    inputs = torch.cat([model.embed.weight[row["input_ids"]] for row in safety_rows]).detach()
    slopes = 2 * torch.exp(2 * model.curve.detach())
    torch.testing.assert_close(found, (inputs * slopes).square().sum(0), rtol=1e-4, atol=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(safety_rows, fails, training):
    model = tiny.llama(attention_dropout=0.5).train(training)
    model.model.layers[0].train(not training)
    hooks = lambda: [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]  # noqa: E731
    before = copy.deepcopy((model.config.to_dict(), [module.training for module in model.modules()], hooks()))
    weights, random_state = tiny.weights(model), torch.get_rng_state()
    if fails:

        def interrupt(*_):
            raise Interrupted

        handle = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            collect(model, safety_rows)
        handle.remove()
    else:
        collect(model, safety_rows)
    assert (model.config.to_dict(), [module.training for module in model.modules()], hooks()) == before
    assert tiny.same(weights, tiny.weights(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert vars(model.model.layers[0].mlp).keys() == vars(tiny.llama().model.layers[0].mlp).keys()


def test_dropout_is_off_while_the_safety_data_is_read(safety_rows):
    quiet, noisy = tiny.llama(), tiny.llama(attention_dropout=0.9).train()
    one, other = collect(quiet, safety_rows), collect(noisy, safety_rows)
    for key, moment in one.moments.items():
        torch.testing.assert_close(moment.total, other.moments[key].total)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_observed(safety_rows, in_place):
    expected = collect(tiny.llama(), safety_rows)
    model = tiny.llama()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    model(input_ids=torch.tensor([safety_rows[0]["input_ids"]]))
    found = collect(model, safety_rows)
    assert found.uses == expected.uses
    for key, moment in expected.moments.items():
        torch.testing.assert_close(moment.total, found.moments[key].total)


def test_moments_beyond_the_budget_go_to_disk_and_are_the_same(llama, safety_rows, tmp_path):
    free = collect(llama, safety_rows)
    tight = collect(llama, safety_rows, moment_memory=2000, offload_folder=tmp_path)
    assert list(tmp_path.rglob("*.f32"))
    for key, moment in free.moments.items():
        assert torch.equal(moment.total, tight.moments[key].total)
    del tight, moment
    assert not list(tmp_path.iterdir())


def test_a_budget_without_a_folder_is_an_error_on_cpu(llama, safety_rows):
    with pytest.raises(ConfigurationError, match="offload_folder"):
        collect(llama, safety_rows, moment_memory="1KB")


def test_a_model_without_linear_layers_is_an_error(safety_rows):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(tiny.VOCABULARY, 4)

        def forward(self, input_ids):
            return self.embed(input_ids)

    with pytest.raises(CaptureError, match="Flat has no linear layer"):
        collect(Flat(), safety_rows)


def test_inf_in_activations_names_the_first_layer_that_reads_it(llama, safety_rows):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        collect(llama, safety_rows)


def test_sequences_longer_than_the_model_takes_are_an_error(llama):
    with pytest.raises(DataError, match="max_length=32"):
        collect(llama, tiny.rows(2, seed=0, length=40))
    assert collect(llama, tiny.rows(2, seed=0, length=40), max_length=32).header.tokens == 64


def test_token_ids_of_another_tokenizer_are_an_error(llama):
    with pytest.raises(DataError, match="does not belong"):
        collect(llama, [{"input_ids": [3, tiny.VOCABULARY]}])


def test_header_says_what_the_profile_was_made_from(llama, safety_rows):
    header = collect(llama, safety_rows).header
    assert header.architecture == "LlamaForCausalLM"
    assert set(header.base) == {name for name, _ in llama.named_parameters()}
    assert (header.sequences, header.tokens) == (24, sum(len(row["input_ids"]) for row in safety_rows))
    assert header.tokenizer is None and len(read_safety_data(safety_rows)) == 24


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_embeddings_that_compute_their_row_numbers_are_counted_by_what_they_look_up(safety_rows, batch_size):
    counts = torch.zeros(34)
    for row in safety_rows:
        counts[2 : 2 + len(row["input_ids"])] += 1
    profile = collect(opt(), safety_rows, batch_size=batch_size)
    assert torch.equal(moment_of(profile, "model.decoder.embed_positions.weight").total, counts)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_flattened_inputs_and_routed_tokens_count_once(safety_rows, batch_size):
    class Routed(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(8, 8)

        def forward(self, input_ids):
            hidden = self.embed(input_ids.flatten())
            first = hidden[:1].clone()
            hidden = torch.cat([self.expert(first), hidden[1:]])
            return self.down(torch.relu(self.up(hidden)))

    tokens = sum(len(row["input_ids"]) for row in safety_rows)
    torch.manual_seed(0)
    profile = collect(Routed(), safety_rows, batch_size=batch_size)
    assert moment_of(profile, "embed.weight").total.sum() == tokens
    batches = len({len(row["input_ids"]) for row in safety_rows}) if batch_size == 8 else len(safety_rows)
    assert moment_of(profile, "expert.weight").tokens >= batches
    assert moment_of(profile, "expert.weight").tokens == moment_of(profile, "expert.bias").total.item() <= tokens
    assert moment_of(profile, "expert.weight").tokens <= len(safety_rows)


def test_what_a_subclass_adds_to_a_product_changes_no_moment(safety_rows):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Model(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.doubled = Doubled(16, 16)

        def forward(self, input_ids):
            return self.down(self.doubled(torch.relu(self.up(self.embed(input_ids)))))

    model = Model()
    profile = collect(model, safety_rows)
    inputs = observed_inputs(model, "doubled", safety_rows)
    torch.testing.assert_close(
        moment_of(profile, "doubled.weight").total.double(), inputs.T @ inputs, rtol=1e-4, atol=1e-4
    )
    assert not profile.header.skipped


def test_layers_are_observed_however_their_input_is_passed(safety_rows):
    class Keywords(tiny.Plain):
        def forward(self, input_ids):
            return self.down(input=torch.relu(self.up(input=self.embed(input=input_ids))))

    plain, keywords = tiny.Plain(), Keywords()
    keywords.load_state_dict(plain.state_dict())
    one, other = collect(plain, safety_rows), collect(keywords, safety_rows)
    assert one.uses == other.uses
    for key, moment in one.moments.items():
        torch.testing.assert_close(moment.total, other.moments[key].total)


def test_norms_with_a_gate_or_several_outputs_are_observed(safety_rows):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x, gate):
            return nn.functional.rms_norm(x, (8,), self.weight) * torch.sigmoid(gate), x

    class Model(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.fused = Fused()

        def forward(self, input_ids):
            hidden, _ = self.fused(self.embed(input_ids), self.embed(input_ids))
            return self.down(torch.relu(self.up(hidden)))

    model = Model()
    inputs = observed_inputs(model, "fused", safety_rows)
    normalised = nn.functional.rms_norm(inputs, (8,))
    found = moment_of(collect(model, safety_rows), "fused.weight").total
    torch.testing.assert_close(found.double(), normalised.square().sum(0), rtol=1e-4, atol=1e-3)


def test_a_weight_used_by_two_linear_layers_has_one_use_and_both_inputs(safety_rows):
    class Tied(tiny.Plain):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(8, 16)
            self.again.weight = self.up.weight

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            return self.down(torch.relu(self.up(hidden) + self.again(2 * hidden)))

    plain, tied = tiny.Plain(), Tied()
    tied.load_state_dict(plain.state_dict(), strict=False)
    one, both = collect(plain, safety_rows), collect(tied, safety_rows)
    torch.testing.assert_close(
        moment_of(both, "up.weight").total, 5 * moment_of(one, "up.weight").total, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
        ({"max_length": -1}, "max_length=-1 must be"),
        ({"moment_memory": "lots"}, "moment_memory='lots' is no number of bytes"),
        ({"moment_memory": -5}, "moment_memory=-5 is no number of bytes"),
    ],
)
def test_settings_out_of_range_are_named_errors(llama, safety_rows, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        collect(llama, safety_rows, **settings)
