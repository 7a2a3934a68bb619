"""Files to files: what is written is what adjusting in memory gives, and nothing but that."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from safedelta_hf import SafeDelta, adjust_adapter, adjust_adapter_files, adjust_model
from safedelta_hf.errors import AdapterError, BaseWeightsError, NumericalError, ProfileError
from tests.adapter.test_adjust import BASES, RULE, VARIANTS
from tests.fixtures import adapters, tiny

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    for name, make in BASES.items():
        adapters.profile_of(make()).save(folder / name)
    return folder


@pytest.fixture
def saved(tmp_path):
    model = adapters.adapted(tiny.llama())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def adjusted(adapter, profiles, output, kind="llama", **settings):
    return adjust_adapter_files(adapter, profile=profiles / kind, output=output, rule=RULE, progress=False, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_to_files_is_the_adjustment_in_memory(variant, profiles, tmp_path):
    from safedelta_hf import SafetyProfile

    kind, changes = VARIANTS[variant]
    base = BASES[kind]()
    base.save_pretrained(tmp_path / "base")
    model = adapters.adapted(base, **changes)
    model.save_pretrained(tmp_path / "in")
    before = files(tmp_path / "in")
    report = adjusted(tmp_path / "in", profiles, tmp_path / "out", kind, base=tmp_path / "base")
    expected = adjust_adapter(model, profile=SafetyProfile.load(profiles / kind), rule=RULE, progress=False)
    assert {record.parameter: record.outcome for record in report.parameters} == {
        record.parameter: record.outcome for record in expected.parameters
    }
    assert files(tmp_path / "in") == before
    found = files(tmp_path / "out")
    assert {name: data for name, data in found.items() if name != FILE} == {
        name: data for name, data in before.items() if name != FILE
    }
    old, new = load_file(tmp_path / "in" / FILE), load_file(tmp_path / "out" / FILE)
    assert {k: (t.shape, t.dtype) for k, t in new.items()} == {k: (t.shape, t.dtype) for k, t in old.items()}
    loaded = PeftModel.from_pretrained(BASES[kind](), tmp_path / "out")
    assert tiny.same(adapters.own_tensors(loaded), adapters.own_tensors(model))


def test_without_whole_parameters_no_base_is_read(saved, profiles, tmp_path, monkeypatch):
    monkeypatch.setattr("safedelta_hf.weights.readers.FilesReader.__init__", None)
    report = adjusted(saved, profiles, tmp_path / "out")
    assert set(report.outcomes) == {"adjusted"}


def test_a_half_precision_adapter_keeps_its_types(saved, profiles, tmp_path):
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(saved / FILE).items()}
    save_file(tensors, saved / FILE)
    report = adjusted(saved, profiles, tmp_path / "out")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "out" / FILE).values())
    assert all("bfloat16" in record.notes[-1] for record in report.parameters)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"init_lora_weights": "pissa", "alpha_pattern": {"q_proj": 9}, "rank_pattern": {"q_proj": 2, "up_proj": 6}},
    ],
)
def test_an_adapter_that_took_base_weights_along_comes_back_for_the_original_base(changes, profiles, tmp_path):
    from safedelta_hf import SafetyProfile

    torch.manual_seed(3)
    model = get_peft_model(tiny.llama(), adapters.config(**changes))
    model.save_pretrained(tmp_path / "initial")
    adapters.trained(model)
    model.save_pretrained(tmp_path / "in")
    expected = adapters.merged(model)
    profile = SafetyProfile.load(profiles / "llama")
    adjust_model(expected, base=tiny.llama(), profile=profile, rule=RULE, progress=False)
    with pytest.raises(AdapterError, match="initial_adapter"):
        adjusted(tmp_path / "in", profiles, tmp_path / "out")
    adjusted(tmp_path / "in", profiles, tmp_path / "out", initial_adapter=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    adapters.assert_close_weights(loaded.merge_and_unload(), expected, tolerance=1e-4)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 8


def test_an_initial_adapter_that_does_not_belong_is_refused(saved, profiles, tmp_path):
    stopped(saved, profiles, AdapterError, "nothing has to be subtracted", initial_adapter=saved)
    torch.manual_seed(3)
    for name, changes in {"one": {}, "other": {"r": 2}}.items():
        model = get_peft_model(tiny.llama(), adapters.config(init_lora_weights="pissa", **changes))
        model.save_pretrained(tmp_path / name)
    stopped(tmp_path / "one", profiles, AdapterError, "holds other tensors", initial_adapter=tmp_path / "other")


def stopped(adapter, profiles, error, match, kind="llama", **settings):
    before, output = files(adapter), adapter.parent / "stopped"
    with pytest.raises(error, match=match):
        adjusted(adapter, profiles, output, kind, **settings)
    assert files(adapter) == before
    assert not output.exists()
    assert not list(adapter.parent.glob(".stopped*")), "a half-written folder was left"


def change(folder, update):
    tensors = load_file(folder / FILE)
    update(tensors)
    save_file(tensors, folder / FILE)


def test_a_profile_of_another_architecture_or_shape_is_refused(saved, profiles, tmp_path):
    stopped(saved, profiles, ProfileError, "not among those of the GPT2LMHeadModel", kind="gpt2")
    for kind, size in (("wide", 32), ("narrow", 8)):
        adapters.profile_of(tiny.llama(hidden_size=size)).save(tmp_path / kind)
        message = rf"k_proj.weight: has the shape \[8, 16\], and \[{size // 2}, {size}\] in the model that the profile"
        stopped(saved, tmp_path, ProfileError, message, kind=kind)


def test_whole_parameters_are_compared_with_the_base_of_the_profile(profiles, tmp_path):
    model = adapters.adapted(tiny.llama(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    tiny.perturbed(tiny.llama()).save_pretrained(tmp_path / "other")
    stopped(tmp_path / "adapter", profiles, BaseWeightsError, "not that of the base", base=tmp_path / "other")
    stopped(tmp_path / "adapter", profiles, BaseWeightsError, "lm_head.weight: .*pass base=")


def test_a_truncated_file_is_refused(saved, profiles):
    data = (saved / FILE).read_bytes()
    for length in (4, len(data) // 2):
        (saved / FILE).write_bytes(data[:length])
        stopped(saved, profiles, AdapterError, "is the file complete")


def test_a_missing_factor_is_refused(saved, profiles):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    change(saved, lambda tensors: tensors.pop(name))
    stopped(saved, profiles, AdapterError, "layers.0.mlp.up_proj.lora_A.weight: not in the adapter")


def test_nan_and_rank_zero_are_refused_by_name(saved, profiles):
    name = "base_model.model.model.layers.1.mlp.up_proj"

    def nan(tensors):
        tensors[f"{name}.lora_A.weight"][0, 0] = float("nan")

    def empty(tensors):
        tensors[f"{name}.lora_A.weight"] = torch.zeros(0, 16)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(24, 0)

    change(saved, nan)
    stopped(saved, profiles, NumericalError, r"layers.1.mlp.up_proj.lora_A.weight: .*NaN")
    change(saved, empty)
    stopped(saved, profiles, AdapterError, "rank 0")


def test_a_rank_that_the_configuration_does_not_give_is_refused(saved, profiles):
    settings = json.loads((saved / CONFIG).read_text())
    (saved / CONFIG).write_text(json.dumps(settings | {"r": 8}))
    stopped(saved, profiles, AdapterError, "have rank 4, adapter_config.json says 8")


def test_an_output_that_exists_is_refused(saved, profiles, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError, match="exists already"):
        adjusted(saved, profiles, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_is_no_adapter_is_refused(saved, profiles, tmp_path):
    stopped(profiles / "llama", profiles, AdapterError, "holds no adapter_config.json")
    (saved / FILE).rename(saved / "adapter_model.bin")
    stopped(saved, profiles, AdapterError, "safe_serialization")
    (saved / CONFIG).write_text("{")
    stopped(saved, profiles, AdapterError, "no adapter configuration")


def test_a_tensor_that_belongs_to_nothing_is_refused(saved, profiles):
    change(saved, lambda tensors: tensors.update(stranger=torch.zeros(3)))
    stopped(saved, profiles, AdapterError, "stranger: a tensor of the adapter that is neither")


def test_other_adapters_and_checkpoints_in_subfolders_are_not_copied(saved, profiles, tmp_path):
    shutil.copytree(saved, saved / "checkpoint-3")
    (saved / "notes.txt").write_text("mine")
    adjusted(saved, profiles, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def test_a_bias_on_a_layer_without_one_is_refused(profiles, tmp_path):
    adapters.adapted(tiny.llama(), lora_bias=True).save_pretrained(tmp_path / "adapter")
    stopped(tmp_path / "adapter", profiles, AdapterError, "adds a bias to a layer that has none")


def test_the_rule_is_the_one_that_is_given(saved, profiles, tmp_path):
    settings = {"profile": profiles / "llama", "progress": False}
    adjust_adapter_files(saved, output=tmp_path / "none", rule=SafeDelta(strength=0.0), **settings)
    everything = SafeDelta(strength=float("inf"), exclude_top=0.0)
    adjust_adapter_files(saved, output=tmp_path / "all", rule=everything, **settings)
    assert tiny.same(load_file(tmp_path / "all" / FILE), load_file(saved / FILE))
    assert not any(t.any() for k, t in load_file(tmp_path / "none" / FILE).items() if "lora_A" in k)
