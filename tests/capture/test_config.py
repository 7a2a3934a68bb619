import pytest
from torch import nn

from safedelta_hf import ProfileConfig, SafeDelta, Treatment, adjust_model, collect_profile
from safedelta_hf.errors import ConfigurationError, CoverageError
from safedelta_hf.records.uses import Role
from tests.fixtures import architectures, tiny

ROWS = tiny.rows(8, seed=1)
PRODUCTS = (Role.LINEAR, Role.HEAD, Role.CONV1D, Role.CONVOLUTION)


def adjusted_products(model, **settings):
    profile = collect_profile(model, ROWS, progress=False, config=ProfileConfig(**settings))
    return {use.parameter.removesuffix(".weight") for use in profile.uses if use.role in PRODUCTS}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"targets": ["q_proj"]}, {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}),
        ({"targets": ["mlp.up_proj", "lm_head"]}, {*(f"model.layers.{n}.mlp.up_proj" for n in range(2)), "lm_head"}),
        ({"targets": r"model\.layers\.0\.mlp\..*"}, {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        ({"targets": ["q_proj"], "layers_to_transform": 1}, {"model.layers.1.self_attn.q_proj"}),
        (
            {"layers_to_transform": [0], "layers_pattern": "layers", "targets": ["q_proj", "k_proj", "lm_head"]},
            {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"},
        ),
    ],
)
def test_targets_choose_linear_weights_as_in_peft(settings, expected):
    assert adjusted_products(tiny.llama(), **settings) == expected


@pytest.mark.parametrize(
    ("targets", "layers", "pattern"),
    [
        (["q_proj", "up_proj"], None, None),
        (["down_proj"], [0], None),
        (["o_proj"], [1], "layers"),
        (r".*mlp\..*_proj", None, None),
    ],
)
def test_the_choice_is_that_of_peft(targets, layers, pattern):
    from peft import LoraConfig, get_peft_model

    expected = get_peft_model(
        tiny.llama(),
        LoraConfig(target_modules=targets, layers_to_transform=layers, layers_pattern=pattern),
    ).targeted_module_names
    found = adjusted_products(tiny.llama(), targets=targets, layers_to_transform=layers, layers_pattern=pattern)
    assert found == set(expected)


def test_by_default_everything_linear_is_chosen():
    model = tiny.llama()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert adjusted_products(model) == linear == adjusted_products(model, targets="all-linear")


def test_experts_are_chosen_by_the_name_of_their_parameter():
    chosen = adjusted_products(architectures.tiny_model("mixtral"), targets=["experts.down_proj"])
    assert chosen == {f"model.layers.{n}.mlp.experts.down_proj" for n in range(2)}


def test_what_is_not_chosen_is_left_by_an_explicit_setting():
    base = tiny.llama(attention_bias=True, mlp_bias=True)
    tuned = tiny.perturbed(tiny.llama(attention_bias=True, mlp_bias=True))
    profile = collect_profile(base, ROWS, progress=False, config=ProfileConfig(targets=["q_proj"]))
    with pytest.raises(CoverageError, match="not among the targets"):
        adjust_model(tuned, base=base, profile=profile, rule=SafeDelta(), progress=False)
    report = adjust_model(
        tuned, base=base, profile=profile, rule=SafeDelta(), treatment=Treatment(uncovered="keep"), progress=False
    )
    outcomes = {record.parameter: record.outcome for record in report.parameters}
    assert {name for name, outcome in outcomes.items() if outcome == "kept"} == {
        name for name in outcomes if "_proj" in name and "q_proj" not in name or "lm_head" in name
    }
    assert outcomes["model.norm.weight"] == outcomes["model.layers.0.self_attn.q_proj.bias"] == "adjusted"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": []}, "chooses nothing"),
        ({"targets": "("}, "no regular expression"),
        ({"targets": ".*", "layers_to_transform": [0]}, "does not go together"),
        ({"layers_pattern": "layers"}, "no effect"),
        ({"targets": ["q_prj"]}, "choose none of the 15 linear weights of LlamaForCausalLM"),
        ({"targets": ["q_proj"], "layers_to_transform": [7]}, "choose none"),
    ],
)
def test_targets_that_choose_nothing_are_named_errors(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        collect_profile(tiny.llama(), ROWS, progress=False, config=ProfileConfig(**settings))


def test_a_regular_expression_has_to_match_a_whole_name():
    assert not ProfileConfig(targets="q_proj").targets_include("model.layers.0.self_attn.q_proj.weight")
    assert ProfileConfig(targets=r".*\.q_proj").targets_include("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("choice", ["keep", "reset"])
def test_a_tower_beside_the_language_model_is_left_by_its_setting(choice):
    base = architectures.tiny_model("gemma3")
    tuned = tiny.perturbed(architectures.tiny_model("gemma3"))
    profile = collect_profile(
        base, ROWS, progress=False, config=ProfileConfig(targets=r"model\.language_model\..*|lm_head")
    )
    report = adjust_model(
        tuned, base=base, profile=profile, rule=SafeDelta(), treatment=Treatment(uncovered=choice), progress=False
    )
    for record in report.parameters:
        is_tower = "language_model" not in record.parameter and "lm_head" not in record.parameter
        assert (record.outcome == {"keep": "kept", "reset": "reset"}[choice]) == is_tower, record
        assert not is_tower or "never reached" in record.reason
