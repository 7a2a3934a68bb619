"""What is told of a base without data is what capture finds with data, and rules that read no moments need no more."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safedelta_hf import (
    AutoStrength,
    ProfileConfig,
    Ridge,
    SafeDeltaCallback,
    Scale,
    Slerp,
    Treatment,
    adjust_adapter,
    adjust_adapter_files,
    adjust_checkpoint,
    adjust_model,
    adjust_saved,
    collect_profile,
)
from safedelta_hf.capture.without_data import base_without_data, digested, profile_without_data
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError, BaseWeightsError, CheckpointError, ConfigurationError, ProfileError
from safedelta_hf.report.provenance import read_provenance
from safedelta_hf.weights.digest import fingerprint
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.fixtures import adapters, architectures, checkpoints, parametrised, tiny

HALF = Scale(strength=1.0)
ONLY_DATA_TELL = (".sinks", ".A_log")
"""Neither their shape nor their module says how they are used."""
UNREAD = "no safety data were read"


def described(model):
    opened = open_model(model)
    return profile_without_data(opened, fingerprint(opened))


def matrices(profile):
    return {(use.parameter, use.role, use.view, use.shape) for use in profile.uses}


@pytest.mark.parametrize(
    "key", ["llama", "gpt2", "mixtral", "gpt_oss", "falcon", "gemma3_text", "mamba", "bloom", "dbrx"]
)
def test_every_use_that_data_show_is_told_without_data_alike_from_memory_and_files(key, tmp_path):
    model = architectures.tiny_model(key)
    if key == "dbrx" and model.transformer.blocks[0].ffn.router.layer.in_features != model.config.hidden_size:
        pytest.skip("this transformers routes by the feed-forward's width, and so runs no dbrx of two widths")
    seen = collect_profile(model, tiny.rows(6, seed=1), config=ProfileConfig(holdout=0.0), progress=False)
    told = described(model)
    # What data show in parts (fused projections, experts) is one matrix or as many here.
    whole = {use.parameter for use in told.uses if use.view.covers(torch.Size(use.shape).numel())}
    parts = {use.parameter for use in seen.uses if not use.view.covers(torch.Size(use.shape).numel())}
    wanted = {one for one in matrices(seen) if one[0] not in whole & parts and not one[0].endswith(ONLY_DATA_TELL)}
    assert wanted and wanted - matrices(told) == set()
    assert {use.parameter for use in told.uses} == set(told.header.base)
    assert told.header.base == seen.header.base and told.header.dtypes == seen.header.dtypes
    model.save_pretrained(tmp_path)
    files, reader = base_without_data(SafetensorsFiles(tmp_path))
    assert matrices(files) == matrices(told)
    assert digested(files, reader).header.base == told.header.base


@pytest.mark.parametrize("kind", ["one layer", "tied", "gpt2", "mixtral", "bfloat16"])
@pytest.mark.parametrize("rule", [HALF, Slerp(strength=1.0)], ids=["scale", "slerp"])
def test_a_checkpoint_comes_out_as_with_a_profile(kind, rule, tmp_path):
    case = checkpoints.case(tmp_path, kind)
    report = case.adjust(rule=rule, profile=None)
    base, tuned, found = (checkpoints.tensors(tmp_path / name) for name in ("base", "tuned", "output"))
    if rule is HALF:
        for name, value in found.items():
            mean = (base[name].double() + tuned[name].double()) / 2
            torch.testing.assert_close(
                value, mean.to(value.dtype), rtol=0, atol=1e-6 if value.dtype != torch.bfloat16 else 1e-2
            )
    if kind != "bfloat16":  # where a profile has errors of rounding fed on
        case.adjust(rule=rule, output=tmp_path / "expected")
        assert checkpoints.contents(tmp_path / "output") == checkpoints.contents(tmp_path / "expected")
    assert report.base_digest == case.profile.header.digest and report.sequences == 0
    assert all(record.tuned_loss is None and record.adjusted_loss is None for record in report.parameters)
    assert not any("quadratic_loss" in name for name in report.metrics()) and not report.warning
    assert (
        UNREAD in report.summary() and UNREAD in report.model_card() and "0 safety examples" not in report.model_card()
    )
    assert json.loads((tmp_path / "output" / "safedelta.json").read_text())["safety_data"]["sequences"] == 0
    told = read_provenance(tmp_path / "output").told
    assert "Safety data: none were read." in told and UNREAD in told


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    case = checkpoints.case(tmp_path, "one layer")
    case.adjust(rule=HALF, profile=None, output=tmp_path / "expected")
    finish, left = checkpoints.adjust_checkpoint, iter(range(3))
    from safedelta_hf.checkpoint.store import CheckpointStore

    genuine = CheckpointStore.finish

    def failing(self, record):
        if next(left, None) is None:
            raise OSError("no space")
        genuine(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "finish", failing)
        with pytest.raises(Exception, match="no space"):
            case.adjust(rule=HALF, profile=None)
    finish(base=case.base, tuned=case.tuned, output=case.output, rule=HALF, progress=False)
    assert checkpoints.contents(case.output) == checkpoints.contents(tmp_path / "expected")


def test_a_model_in_memory_comes_out_as_with_a_profile():
    base, tuned = tiny.llama(tied=True), tiny.perturbed(tiny.llama(tied=True))
    other = tiny.perturbed(tiny.llama(tied=True))
    report = adjust_model(tuned, base=base, rule=HALF, progress=False)
    adjust_model(other, base=base, rule=HALF, profile=adapters.profile_of(base), progress=False)
    assert tiny.same(tiny.weights(tuned), tiny.weights(other)) and UNREAD in report.summary()
    kept = tiny.perturbed(tiny.llama(tied=True))
    before = {name: value.clone() for name, value in tiny.weights(kept).items()}
    adjust_model(kept, base=base, rule=HALF, treatment=Treatment(norms="keep", biases="keep"), progress=False)
    now = tiny.weights(kept)
    assert {name for name in now if torch.equal(now[name], before[name])} == {name for name in now if "norm" in name}


def test_weights_that_are_computed_are_adjusted_as_one():
    base, tuned, other = (parametrised.llama(parametrised.old_weight_norm) for _ in range(3))
    tiny.perturbed(tuned), tiny.perturbed(other)
    adjust_model(tuned, base=base, rule=HALF, progress=False)
    adjust_model(other, base=base, rule=HALF, profile=adapters.profile_of(base), progress=False)
    assert tiny.same(tiny.weights(tuned), tiny.weights(other))


def test_an_adapter_comes_out_scaled_in_memory_and_in_files(tmp_path):
    base = tiny.llama()
    checkpoints.save(base, tmp_path / "base")
    model = adapters.adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    before = {name: value.clone() for name, value in adapters.own_tensors(model).items()}
    given = {"rule": HALF, "progress": False}
    report = adjust_adapter(model, **given)
    written = adjust_adapter_files(tmp_path / "adapter", output=tmp_path / "out", base=tmp_path / "base", **given)
    saved = adjust_saved(tuned=tmp_path / "adapter", output=tmp_path / "saved", base=tmp_path / "base", **given)
    now = adapters.own_tensors(model)
    for name in before:
        torch.testing.assert_close(now[name], before[name] / (2 if "lora_A" in name else 1))
    for folder in ("out", "saved"):
        assert tiny.same(load_file(tmp_path / folder / "adapter_model.safetensors"), now)
    for one in (report, written, saved):
        assert (
            not one.unverified and UNREAD in one.summary() and one.base_digest == described(tiny.llama()).header.digest
        )


def test_biases_that_an_adapter_trained_in_place_need_the_base():
    base = tiny.gpt2()
    model = get_peft_model(tiny.gpt2(), LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True))
    adapters.trained(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter += 1
    with pytest.raises(AdapterError, match="pass base=<the model or folder that the fine-tuning started from>"):
        adjust_adapter(model, rule=HALF, progress=False)
    held = open_model(model)
    before = {name: held.read(name).clone() for name in held.names}
    adjust_adapter(model, base=base, rule=HALF, progress=False)
    for name, value in tiny.weights(base).items():
        if name.endswith("bias"):
            assert not torch.equal(before[name], value)
            torch.testing.assert_close(held.read(name), (before[name] + value) / 2)


def test_the_callback_adjusts_at_the_end_of_training(tmp_path):
    model, base = tiny.llama(), tiny.weights(tiny.llama())
    callback = SafeDeltaCallback(rule=HALF, keep_tuned=tmp_path / "tuned")
    trainer = tiny.trainer(model, callback, tmp_path / "run")
    trainer.train()
    tuned = tiny.weights(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"))
    for name, value in tiny.weights(model).items():
        torch.testing.assert_close(value, (base[name] + tuned[name]) / 2)
    assert UNREAD in callback.report.summary()
    with pytest.raises(ProfileError, match="ridge: this rule needs safety data, and none was read"):
        callback.adjust(model, rule=Ridge(strength=1.0))
    with pytest.raises(ProfileError, match="no data was read"):
        callback.profile.save(tmp_path / "profile")


def test_a_saved_model_is_adjusted_by_both_roads(tmp_path):
    case = checkpoints.case(tmp_path, "one layer")
    report = adjust_saved(base=case.base, tuned=case.tuned, output=case.output, rule=HALF, progress=False)
    case.adjust(rule=HALF, output=tmp_path / "expected")
    assert UNREAD in report.summary()
    assert checkpoints.contents(case.output) == checkpoints.contents(tmp_path / "expected")


@pytest.mark.parametrize(
    "rule", [Ridge(strength=1.0), Scale(), Slerp(strength=AutoStrength())], ids=["ridge", "scale", "slerp"]
)
def test_whatever_reads_moments_or_measures_asks_for_data_by_name(rule, tmp_path):
    base, tuned = tiny.llama(), tiny.perturbed(tiny.llama())
    before = checkpoints.contents(tmp_path)
    paths = {"base": tmp_path / "base", "tuned": tmp_path / "tuned", "output": tmp_path / "output"}
    with pytest.raises(ConfigurationError, match=f"adjust_model: {rule.name} needs a safety profile of the base"):
        adjust_model(tuned, base=base, rule=rule, progress=False)
    with pytest.raises(ConfigurationError, match=f"adjust_adapter: {rule.name} needs a safety profile of the base"):
        adjust_adapter(adapters.adapted(tiny.llama()), rule=rule, progress=False)
    with pytest.raises(ConfigurationError, match="give either safety_dataset or profile"):
        adjust_saved(**paths, rule=rule)
    with pytest.raises(ConfigurationError, match="give either safety_dataset or profile"):
        SafeDeltaCallback(rule=rule)
    if rule.auto is None:
        with pytest.raises(ConfigurationError, match=f"adjust_checkpoint: {rule.name} needs a safety profile"):
            adjust_checkpoint(**paths, rule=rule)
    with pytest.raises(ConfigurationError, match="ordinary_dataset has no effect without safety_dataset"):
        adjust_saved(**paths, rule=HALF, ordinary_dataset=tiny.rows(3, seed=1))
    with pytest.raises(ConfigurationError, match="save_profile has no effect without safety_dataset"):
        adjust_saved(**paths, rule=HALF, save_profile=tmp_path / "profile")
    assert checkpoints.contents(tmp_path) == before


def test_a_base_of_which_nothing_tells_the_class_is_refused_by_name(tmp_path):
    case = checkpoints.case(tmp_path, "one layer")
    config = json.loads((case.base / "config.json").read_text())
    for changed in ({"architectures": None}, {"architectures": ["Custom"]}):
        (case.base / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(BaseWeightsError, match=r"cannot be told from its files \(.*give a profile of it"):
            case.adjust(rule=HALF, profile=None)
    with pytest.raises(BaseWeightsError, match="cannot be read .* a profile of it"):
        adapter = adapters.adapted(tiny.llama())
        adapter.save_pretrained(tmp_path / "adapter")
        adjust_adapter_files(tmp_path / "adapter", output=tmp_path / "out", rule=HALF, progress=False)
    assert not case.output.exists() and not (tmp_path / "out").exists()


def test_a_fine_tune_of_another_model_is_refused_by_name(tmp_path):
    case = checkpoints.case(tmp_path, "one layer")
    checkpoints.save(tiny.gpt2(), tmp_path / "other")
    with pytest.raises(CheckpointError, match="a parameter of the LlamaForCausalLM"):
        case.adjust(rule=HALF, profile=None, tuned=tmp_path / "other")
