"""Files to files: what is written is what adjusting in memory gives, and nothing but that."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from safedelta_hf import SafeDelta, adjust_adapter, adjust_adapter_files, adjust_model
from safedelta_hf.errors import AdapterError, AdjustmentError, BaseWeightsError, NumericalError, ProfileError
from safedelta_hf.report.provenance import CARD_FILE, RECORD_FILE, read_provenance
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
    found, others = files(tmp_path / "out"), {FILE, RECORD_FILE, CARD_FILE}
    assert found.keys() == before.keys() | {RECORD_FILE} and read_provenance(tmp_path / "out").is_of_weights
    assert all(found[name] == before[name] for name in before.keys() - others)
    old, new = load_file(tmp_path / "in" / FILE), load_file(tmp_path / "out" / FILE)
    assert {k: (t.shape, t.dtype) for k, t in new.items()} == {k: (t.shape, t.dtype) for k, t in old.items()}
    loaded = PeftModel.from_pretrained(BASES[kind](), tmp_path / "out")
    assert tiny.same(adapters.own_tensors(loaded), adapters.own_tensors(model))


def test_without_whole_parameters_no_base_is_needed(saved, profiles, tmp_path):
    changed(saved, base_model_name_or_path=str(tmp_path / "gone"))
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
        message = rf"_proj.weight: has the shape \[.*\] by .*, and \[.*{size}.*\] in the model that the profile was"
        stopped(saved, tmp_path, ProfileError, message, kind=kind)


def qwen2():
    """Of another class, with more parameters, and the same shapes where they have the same names."""
    settings = {name: value for name, value in tiny.llama().config.to_dict().items() if name not in ("model_type",)}
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()


def changed(folder, **settings):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("make", [qwen2, lambda: tiny.perturbed(tiny.llama())])
@pytest.mark.parametrize("known_by", ["the folder it names", "the folder given", "the model given"])
def test_a_profile_of_another_base_is_refused_wherever_base_weights_can_be_read(make, known_by, saved, tmp_path):
    base = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    changed(saved, base_model_name_or_path=str(tmp_path / "base") if known_by == "the folder it names" else None)
    given = {"the folder given": tmp_path / "base", "the model given": base}.get(known_by)
    for name, other in (("right", base), ("wrong", make())):
        adapters.profile_of(other).save(tmp_path / name)
    stopped(saved, tmp_path, ProfileError, "not the base of this adapter: .* is another weight", "wrong", base=given)
    report = adjusted(saved, tmp_path, tmp_path / "out", "right", base=given)
    assert report.unverified == report.warning == ""


def profile_named(name, revision=None, **changes):
    profile = adapters.profile_of(tiny.llama())
    return replace(profile, header=replace(profile.header, name=name, revision=revision, **changes))


ONE, OTHER = "1" * 40, "2" * 40


@pytest.mark.parametrize(
    ("named", "revision", "made_of", "expected"),
    [
        ("org/llama", None, ("org/llama", ONE), ""),
        ("Org/Llama", "main", ("org/llama", ONE), ""),
        ("org/llama", ONE, ("org/llama", ONE), ""),
        ("org/llama", OTHER, ("org/llama", ONE), f"the adapter is on revision {OTHER} of org/llama"),
        (None, None, ("org/llama", ONE), "names no base"),
        ("/moved/llama", None, ("org/llama", ONE), "names '/moved/llama' as its base, which cannot be compared"),
        ("org/llama", None, (None, None), r"cannot be compared with what the profile names \(LlamaForCausalLM\)"),
    ],
)
def test_where_no_base_can_be_read_names_are_compared_and_doubt_is_told(
    named, revision, made_of, expected, saved, tmp_path
):
    changed(saved, base_model_name_or_path=named, revision=revision)
    settings = {"profile": profile_named(*made_of), "rule": RULE, "progress": False}
    report = adjust_adapter_files(saved, output=tmp_path / "out", **settings)
    assert re.search(expected, report.unverified) and bool(report.unverified) == bool(expected)
    for told in (report.summary(), report.model_card(), report.table(), json.dumps(report.to_dict())):
        assert ("base not verified: the adapter" in told) == bool(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_model_name_or_path": "org/qwen2"},
        {"base_model_name_or_path": None, "auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
        {"base_model_name_or_path": "org/llama", "auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
    ],
)
def test_names_of_two_bases_are_refused_until_weights_can_be_compared(settings, saved, tmp_path):
    changed(saved, **settings)
    profile_named("org/llama").save(tmp_path / "llama")
    stopped(saved, tmp_path, ProfileError, r"made of org/llama \(LlamaForCausalLM\), and the adapter .*pass base=")
    assert adjusted(saved, tmp_path, tmp_path / "out", base=tiny.llama()).unverified == ""


def test_a_class_that_a_sharded_model_was_given_is_no_other_base(saved, tmp_path):
    changed(saved, auto_mapping={"base_model_class": "FSDPLlamaForCausalLM"}, base_model_name_or_path="org/llama")
    profile_named("org/llama").save(tmp_path / "llama")
    assert adjusted(saved, tmp_path, tmp_path / "out").unverified == ""


def test_a_weight_that_is_packed_in_one_of_the_two_alone_tells_nothing(saved, tmp_path):
    base = tiny.llama()
    linear = [name for name in tiny.weights(base) if "proj" in name]
    digests = {name: "of packed data" for name in linear}
    profile = profile_named(None, packed=tuple(linear))
    header = replace(profile.header, base={**profile.header.base, **digests})
    settings = {"rule": RULE, "progress": False, "base": base}
    report = adjust_adapter_files(saved, profile=replace(profile, header=header), output=tmp_path / "out", **settings)
    assert report.unverified == ""  # by the embeddings and norms


def test_a_base_that_was_given_and_cannot_be_read_is_refused(saved, profiles, tmp_path):
    stopped(saved, profiles, BaseWeightsError, "holds neither model.safetensors", base=tmp_path)


def test_whole_parameters_are_compared_with_the_base_of_the_profile(profiles, tmp_path):
    model = adapters.adapted(tiny.llama(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    tiny.perturbed(tiny.llama()).save_pretrained(tmp_path / "other")
    stopped(tmp_path / "adapter", profiles, ProfileError, "is another weight", base=tmp_path / "other")
    stopped(tmp_path / "adapter", profiles, BaseWeightsError, "lm_head.weight: .*pass base=")


def test_a_truncated_file_is_refused(saved, profiles):
    data = (saved / FILE).read_bytes()
    for length in (4, len(data) // 2):
        (saved / FILE).write_bytes(data[:length])
        stopped(saved, profiles, AdapterError, "is the file complete")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_a_named_error(error, saved, profiles, monkeypatch):
    monkeypatch.setattr("safedelta_hf.deltas.lora_folder.save_file", lambda *_, **__: (_ for _ in ()).throw(error))
    stopped(saved, profiles, AdjustmentError, "while adjusting the adapter .*No space left.*nothing was written")


def test_factors_that_peft_would_not_load_are_refused_by_name(saved, profiles):
    def high(tensors):
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
        tensors[name] = torch.zeros(48, 4)  # zero, so that it changes nothing

    modules = json.loads((saved / CONFIG).read_text())["target_modules"]
    changed(saved, target_modules=[name for name in modules if name != "up_proj"])
    stopped(saved, profiles, AdapterError, "layers.0.mlp.up_proj: none of the target_modules")
    changed(saved, target_modules=".*_proj")
    change(saved, high)
    message = r"up_proj.weight: has the shape \[48, 16\] by the adapter's tensors, and \[24, 16\] in the model"
    stopped(saved, profiles, ProfileError, message)


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
