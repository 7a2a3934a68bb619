"""Further models wherever they are kept: each is seen as what it changed of the base."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedelta_hf import ModelStock, SafeMerge, Ties
from safedelta_hf.errors import MergeError, NumericalError
from tests.adjust.test_merging import MODELS, merge
from tests.fixtures import adapters, tiny
from tests.fixtures import merging as oracles


@pytest.fixture(scope="module")
def profiles():
    return {name: adapters.profile_of(make()) for name, make in MODELS.items()}


@pytest.fixture
def profile(profiles):
    return profiles["llama"]


def in_memory(model, folder):
    return model


def in_files(model, folder):
    model.save_pretrained(folder)
    return folder


class Reader:
    source = "a reader"

    def __init__(self, model):
        self.weights = tiny.weights(model)

    def read(self, name):
        return self.weights[name]


@pytest.mark.parametrize("where", [in_memory, in_files, lambda model, folder: Reader(model)])
@pytest.mark.parametrize("kind", ["tied llama", "gpt2"])
def test_a_further_model_may_be_in_memory_in_files_or_behind_a_reader(where, kind, profiles, tmp_path):
    base, one, other = MODELS[kind](), tiny.perturbed(MODELS[kind]()), tiny.perturbed(MODELS[kind](), seed=6)
    before = tiny.weights(one), tiny.weights(other)
    found, _ = merge(Ties(strength=0.0, others=[where(other, tmp_path / "other")]), profiles[kind], one, base)
    for name, weight in tiny.weights(base).items():
        expected = oracles.ties([weights[name] - weight for weights in before], 1.0)
        torch.testing.assert_close((found[name] - weight).double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_folder_of_a_lora_stands_for_the_model_that_it_makes(kind, profiles, tmp_path):
    changes = (
        {} if kind == "llama" else {"target_modules": ["c_attn", "c_proj"], "lora_bias": True, "fan_in_fan_out": True}
    )
    base = MODELS[kind]()
    safe = adapters.adapted(base, **changes)
    safe.save_pretrained(tmp_path / "safe")
    unaligned = tiny.perturbed(MODELS[kind](), seed=3)
    results = []
    for given in (tmp_path / "safe", adapters.merged(safe)):
        rule = SafeMerge(strength=1.0, threshold=1.0, unaligned=unaligned, safe=given)
        tuned = tiny.perturbed(MODELS[kind]())
        results.append(merge(rule, profiles[kind], tuned, base)[0])
    assert results[0].keys() == results[1].keys()
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-5, atol=1e-6)


def unreadable(tmp_path):
    return ModelStock(strength=1.0, others=[tmp_path / "nothing"])


def incomplete(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return ModelStock(strength=1.0, others=[tmp_path])


def of_another_shape(tmp_path):
    return ModelStock(strength=1.0, others=[tiny.llama(intermediate_size=32)])


def not_a_number(tmp_path):
    model = tiny.llama()
    model.model.norm.weight.data[0] = torch.nan
    return ModelStock(strength=1.0, others=[model])


def with_an_adapter(tmp_path):
    return ModelStock(strength=1.0, others=[adapters.adapted(tiny.llama())])


def with_a_whole_parameter(tmp_path):
    adapters.adapted(tiny.llama(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    return ModelStock(strength=1.0, others=[tmp_path])


def on_another_base(tmp_path):
    adapters.adapted(tiny.llama(num_hidden_layers=3)).save_pretrained(tmp_path)
    return ModelStock(strength=1.0, others=[tmp_path])


def on_a_wider_base(tmp_path):
    adapters.adapted(tiny.llama(intermediate_size=32)).save_pretrained(tmp_path)
    return ModelStock(strength=1.0, others=[tmp_path])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (unreadable, MergeError, "holds no safetensors files of a model and no adapter"),
        (incomplete, MergeError, r"^model\.norm\.weight: .* has no such weight"),
        (
            of_another_shape,
            MergeError,
            r"mlp\.\w+\.weight: \[\d+, \d+\] in a model in memory, \[\d+, \d+\] in the base",
        ),
        (not_a_number, NumericalError, r"^model\.norm\.weight: holds NaN or Inf in a LlamaForCausalLM in memory"),
        (with_an_adapter, MergeError, r"has an adapter beside its weights; pass its merge_and_unload\(\)"),
        (with_a_whole_parameter, MergeError, r"lm_head\.weight: carried whole by the adapter"),
        (on_another_base, MergeError, r"model\.layers\.2\.\S+: tuned by .* no parameter of the base"),
        (on_a_wider_base, MergeError, r"mlp\.\w+\.weight: \[\d+, \d+\] in '.*', \[\d+, \d+\] in the base"),
    ],
)
def test_a_further_model_that_does_not_fit_is_named_and_nothing_is_changed(make, error, message, profile, tmp_path):
    tuned = tiny.perturbed(tiny.llama())
    before = copy.deepcopy(tiny.weights(tuned))
    with pytest.raises(error, match=message):
        merge(make(tmp_path), profile, tuned)
    assert tiny.same(tiny.weights(tuned), before)
