"""Files to files: what is written is what adjusting the loaded model and saving it gives, bit for bit."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedelta_hf import (
    Dare,
    ModelStock,
    ProfileConfig,
    SafeDelta,
    SafeMerge,
    SafetyProfile,
    TaskRidge,
    Ties,
    Treatment,
    adjust_model,
    collect_profile,
)
from safedelta_hf.capture.views import weak_storage
from safedelta_hf.checkpoint.folder import UnfinishedShards
from safedelta_hf.errors import (
    AdjustmentError,
    BaseWeightsError,
    CheckpointError,
    ConfigurationError,
    CoverageError,
    SafeDeltaError,
)
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.fixtures import adapters, architectures, checkpoints, tiny
from tests.fixtures.checkpoints import MODELS, RULE, contents, tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """One case of each kind; copied before it is used."""
    return {kind: checkpoints.case(tmp_path_factory.mktemp(kind), kind) for kind in MODELS}


@pytest.fixture
def case(cases, tmp_path):
    return cases["untied"].copy_to(tmp_path)


def expected(case, folder, shards="4KB", **settings):
    """The oracle: the model in memory, adjusted and saved."""
    model = type(case.model).from_pretrained(case.tuned)
    settings = {"rule": RULE, "profile": case.profile, "base": case.base, "progress": False} | settings
    report = adjust_model(model, **settings)
    checkpoints.save(model, folder, shards)
    return report


def weight_files(folder):
    return {name: data for name, data in contents(folder).items() if name.startswith("model")}


def test_base_and_tuned_that_are_swapped_are_refused(case):
    for swapped in (
        {"base": case.tuned, "tuned": case.base},
        {"base": case.tuned, "tuned": case.base, "rule": Dare(strength=0.5)},
    ):
        with pytest.raises(BaseWeightsError, match=r"base: .*tuned and the fine-tuned model look swapped"):
            case.adjust(**swapped)
        assert not case.output.exists() and not case.work.exists()
    unchanged = case.adjust(tuned=case.base)
    assert set(unchanged.outcomes) == {"unchanged"} and case.output.exists()


@pytest.mark.parametrize("kind", MODELS)
def test_the_output_is_the_adjusted_model_as_save_pretrained_writes_it(kind, cases, tmp_path):
    case = cases[kind].copy_to(tmp_path)
    before = {name: contents(path) for name, path in case.paths.items() if path.exists()}
    report = case.adjust()
    wanted = expected(case, tmp_path / "expected")
    assert report.outcomes == wanted.outcomes and report.metrics() == wanted.metrics()
    assert weight_files(case.output) == weight_files(tmp_path / "expected")
    assert {name: contents(path) for name, path in case.paths.items() if name != "output"} == before
    assert sorted(os.listdir(tmp_path)) == ["base", "expected", "output", "profile", "tuned"]
    type(case.model).from_pretrained(case.output)


@pytest.mark.parametrize(
    "rule",
    [
        SafeDelta(strength=100.0),
        SafeDelta(strength=100.0, compensation="sequential"),
        TaskRidge(strength=1.0),
        Dare(strength=1.0),
    ],
    ids=lambda rule: rule.name,
)
def test_every_kind_of_rule_gives_what_it_gives_in_memory(rule, case, tmp_path):
    task = collect_profile(MODELS["untied"](), tiny.rows(8, seed=4), config=ProfileConfig(holdout=0.0), progress=False)
    task.save(tmp_path / "task")
    case.adjust(rule=rule, task_profile=tmp_path / "task")
    expected(case, tmp_path / "expected", rule=rule, task_profile=task)
    assert weight_files(case.output) == weight_files(tmp_path / "expected")


@pytest.mark.parametrize("make", [ModelStock, Ties], ids=["model_stock", "ties"])
def test_further_models_of_a_merge_are_read_from_their_files(make, case, tmp_path):
    checkpoints.save(tiny.perturbed(MODELS["untied"](), seed=9), tmp_path / "other", "3KB")
    rule = make(strength=1.0, others=[tmp_path / "other"])
    case.adjust(rule=rule)
    expected(case, tmp_path / "expected", rule=rule)
    assert weight_files(case.output) == weight_files(tmp_path / "expected")


def test_a_safe_merge_reads_its_safe_model_from_files(case, tmp_path):
    for seed, name in enumerate(("unaligned", "safe")):
        checkpoints.save(tiny.perturbed(MODELS["untied"](), seed=seed), tmp_path / name)
    rule = SafeMerge(strength=1.0, threshold=1.0, unaligned=tmp_path / "unaligned", safe=tmp_path / "safe")
    case.adjust(rule=rule)
    expected(case, tmp_path / "expected", rule=rule)
    assert weight_files(case.output) == weight_files(tmp_path / "expected")


@pytest.mark.parametrize(("base_shards", "tuned_shards"), [(1, 1), (1, 5), (3, 1), (4, 7)])
def test_it_does_not_matter_how_base_and_tuned_are_split(base_shards, tuned_shards, case, tmp_path):
    wanted = case.adjust(output=tmp_path / "first")
    for folder, count in ((case.base, base_shards), (case.tuned, tuned_shards)):
        if count > 1:
            checkpoints.reshard(folder, count)
        else:
            checkpoints.rename(folder, {})
    report = case.adjust()
    assert report.parameters == wanted.parameters
    assert tiny.same(tensors(case.output), tensors(tmp_path / "first"))
    assert sorted(p.name for p in case.output.glob("*.safetensors")) == sorted(
        p.name for p in case.tuned.glob("*.safetensors")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_fine_tune_in_another_type_than_its_base_keeps_its_type(dtype, case, tmp_path):
    checkpoints.save(case.model.__class__.from_pretrained(case.tuned, dtype=dtype), tmp_path / "cast", "4KB")
    shutil.rmtree(case.tuned)
    shutil.move(tmp_path / "cast", case.tuned)
    case.adjust()
    expected(case, tmp_path / "expected")
    assert weight_files(case.output) == weight_files(tmp_path / "expected")
    assert {tensor.dtype for tensor in tensors(case.output).values()} == {dtype}


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("in_base", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)])
@pytest.mark.parametrize("in_tuned", [(HEAD,), (EMBEDDING, HEAD)])
def test_a_tied_weight_is_found_under_every_name_and_written_under_those_it_had(in_base, in_tuned, cases, tmp_path):
    case = cases["tied"].copy_to(tmp_path)
    expected(case, tmp_path / "expected")
    checkpoints.rename(case.base, {EMBEDDING: in_base})
    checkpoints.rename(case.tuned, {EMBEDDING: in_tuned})
    report = case.adjust()
    wanted, found = tensors(tmp_path / "expected"), tensors(case.output)
    assert set(found) == (set(wanted) - {EMBEDDING}) | set(in_tuned)
    assert all(torch.equal(tensor, wanted.get(name, wanted[EMBEDDING])) for name, tensor in found.items())
    assert [record.aliases for record in report.parameters if record.parameter == EMBEDDING] == [(HEAD,)]
    loaded = tiny.loaded(case.output)
    assert tiny.same(tiny.weights(loaded), tiny.weights(tiny.loaded(tmp_path / "expected")))


def test_a_tied_weight_that_is_stored_twice_and_differs_is_refused(cases, tmp_path):
    case = cases["tied"].copy_to(tmp_path)
    checkpoints.rename(case.tuned, {EMBEDDING: (EMBEDDING, HEAD)})
    path = case.tuned / "model.safetensors"
    stored = load_file(path)
    stored[HEAD][3, 4] += 1
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"^{EMBEDDING}: tied .* which differ"):
        case.adjust()
    assert not case.output.exists() and not case.work.exists()


def test_every_weight_of_both_models_is_read_once_and_the_output_not_at_all(case, monkeypatch):
    checkpoints.rename(case.tuned, {})
    path = case.tuned / "model.safetensors"
    stored, base = load_file(path), tensors(case.base)
    stored["model.norm.weight"] = base["model.norm.weight"]  # is not moved, and copied
    save_file(stored, path, metadata={"format": "pt"})
    read, plain = Counter(), SafetensorsFiles.read

    def counted(files, name, rows=None):
        read[files.source, name] += 1
        return plain(files, name, rows)

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    for again in ("copied", "digest"):
        monkeypatch.setattr(UnfinishedShards, again, lambda *_: pytest.fail("what is in memory is read again"))
    assert case.adjust().outcomes["unchanged"] == 1
    assert read == {(str(folder), name): 1 for folder in (case.base, case.tuned) for name in stored}


def test_a_fine_tune_that_moved_nothing_is_copied(case):
    shutil.rmtree(case.tuned)
    shutil.copytree(case.base, case.tuned)
    report = case.adjust()
    assert set(report.outcomes) == {"unchanged"} and contents(case.output) == contents(case.tuned)


def test_treatment_decides_over_other_parameters(case, tmp_path):
    treatment = Treatment(embeddings="reset", norms="keep", head="reset")
    report = case.adjust(treatment=treatment)
    expected(case, tmp_path / "expected", treatment=treatment)
    assert weight_files(case.output) == weight_files(tmp_path / "expected")
    assert report.outcomes == {"adjusted": 14, "reset": 2, "kept": 5}


def test_a_tuned_parameter_that_no_layer_covers_takes_a_decision(case):
    profile = SafetyProfile(
        header=case.profile.header,
        uses=tuple(use for use in case.profile.uses if use.parameter != "model.norm.weight"),
        moments=case.profile.moments,
    )
    with pytest.raises(CoverageError, match="model.norm.weight"):
        case.adjust(profile=profile)
    assert not case.output.exists() and not case.work.exists()
    report = case.adjust(profile=profile, treatment=Treatment(uncovered="reset"))
    assert report.outcomes == {"adjusted": 20, "reset": 1}


def test_buffers_are_copied_and_named_in_the_report(case):
    for folder, value in ((case.base, 1), (case.tuned, 2)):
        checkpoints.rename(folder, {})
        path = folder / "model.safetensors"
        extra = {"steps": torch.tensor(value), "mask": torch.full((3,), float("-inf")), "gate": torch.ones(2) > 0}
        save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    report = case.adjust()
    assert {r.parameter: r.outcome for r in report.parameters if "no parameter" in r.reason} == {
        "steps": "kept",
        "mask": "kept",
        "gate": "kept",
    }
    found, tuned = tensors(case.output), tensors(case.tuned)
    assert all(torch.equal(found[name], tuned[name]) for name in ("steps", "mask", "gate"))
    assert int(found["steps"]) == 2


def test_a_weight_that_neither_profile_nor_base_knows_is_refused(case):
    checkpoints.rename(case.tuned, {})
    path = case.tuned / "model.safetensors"
    save_file(load_file(path) | {"score.weight": torch.ones(2, 16)}, path)
    with pytest.raises(CheckpointError, match=r"^score\.weight: .* was it trained"):
        case.adjust()


def test_the_weights_of_one_parameter_are_held_at_a_time(case, monkeypatch):
    checkpoints.rename(case.tuned, {})
    read, held, most = SafetensorsFiles.read, [], [0]

    def noted(self, name):
        tensor = read(self, name)
        held.append((weak_storage(tensor), tensor.nbytes))
        most[0] = max(most[0], sum(size for storage, size in held if not storage.expired()))
        return tensor

    monkeypatch.setattr(SafetensorsFiles, "read", noted)
    case.adjust()
    sizes = [tensor.stop - tensor.start for tensor in SafetensorsFiles(case.tuned).tensors.values()]
    assert len(held) == 2 * len(sizes) and most[0] == 2 * max(sizes) < sum(sizes)


def test_files_that_are_links_as_in_the_hub_cache_are_read_and_copied(case, tmp_path):
    wanted = case.adjust(output=tmp_path / "first")
    (tmp_path / "blobs").mkdir()
    for folder in (case.base, case.tuned):
        for number, path in enumerate(sorted(folder.iterdir())):
            blob = path.rename(tmp_path / "blobs" / f"{folder.name}-{number}")
            path.symlink_to(blob)
    assert case.adjust().to_dict() == wanted.to_dict()
    assert contents(case.output) == contents(tmp_path / "first")
    assert not any(path.is_symlink() for path in case.output.iterdir())


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_a_named_error(device, case):
    with pytest.raises(ConfigurationError, match=f"device='{device}' cannot be used here"):
        case.adjust(device=device)
    assert not case.work.exists()


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_it_computes_on_an_accelerator(case, tmp_path):
    case.adjust(device=torch.accelerator.current_accelerator())
    case.adjust(output=tmp_path / "host")
    found, wanted = tensors(case.output), tensors(tmp_path / "host")
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)


def test_another_architecture_is_refused_from_headers(cases, tmp_path):
    case = cases["gpt2"].copy_to(tmp_path)
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel.* not in"):
        case.adjust(base=cases["untied"].base, tuned=cases["untied"].tuned)


def test_a_resized_vocabulary_is_refused(case):
    model = case.model.__class__.from_pretrained(case.tuned)
    model.resize_token_embeddings(56)
    shutil.rmtree(case.tuned)
    checkpoints.save(model, case.tuned)
    with pytest.raises(BaseWeightsError, match=r"\[56, 16\] in .*\[48, 16\].*vocabulary resized"):
        case.adjust()


@pytest.mark.parametrize("base_format", [True, False])
@pytest.mark.parametrize("key", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_experts_are_found_and_written_as_transformers_saves_them(key, base_format, tmp_path):
    base, model = architectures.tiny_model(key), tiny.perturbed(architectures.tiny_model(key))
    profile = adapters.profile_of(base)
    base.save_pretrained(tmp_path / "base", save_original_format=base_format)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    case = checkpoints.Case(tmp_path, model, profile)
    settings = {"profile": profile, "treatment": Treatment(uncovered="keep")}
    report = case.adjust(**settings)
    wanted = adjust_model(model, base=base, rule=RULE, progress=False, **settings)
    model.save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    found = {record.parameter: record for record in report.parameters if "copied as tuned" not in record.reason}
    assert found == {record.parameter: replace(record, aliases=()) for record in wanted.parameters}
    assert weight_files(case.output) == weight_files(tmp_path / "expected")


@pytest.mark.parametrize("damage", ["no configuration", "another", "malformed", "endless", "an expert missing", "cast"])
def test_experts_whose_layout_is_not_known_are_refused_with_the_way_out(damage, cases, tmp_path):
    case = cases["mixtral"].copy_to(tmp_path)
    shutil.rmtree(case.tuned)
    case.model.save_pretrained(case.tuned)
    config = case.tuned / "config.json"
    content = json.loads(config.read_text())
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    if damage == "no configuration":
        config.unlink()
    elif damage in ("an expert missing", "cast"):
        stored = tensors(case.tuned)
        changed = {} if damage == "cast" else {k: v for k, v in stored.items() if k != name}
        save_file(changed or stored | {name: stored[name].bfloat16()}, case.tuned / "model.safetensors")
    else:
        changes = {
            "another": {"hidden_size": 64},
            "malformed": {"model_type": 3},
            "endless": {"num_hidden_layers": 10**12},
        }
        config.write_text(json.dumps(content | changes[damage]))
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.mlp\..*: .*(save|give)"):
        case.adjust()
    assert not case.output.exists() and not case.work.exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
@pytest.mark.parametrize("folder", ["base", "tuned"])
def test_weights_of_few_bits_are_refused_by_name(dtype, folder, case):
    checkpoints.rename(case.folder / folder, {})
    path = case.folder / folder / "model.safetensors"
    stored = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(stored | {name: stored[name].to(dtype)}, path)
    error = BaseWeightsError if folder == "base" else CheckpointError
    with pytest.raises(error, match=rf"{name}: stored as \w+ in .*before it was quantised"):
        case.adjust()


def test_parametrised_weights_are_refused_by_name(case):
    header = replace(case.profile.header, parametrised={"a.weight": ("a.parametrizations.weight.original",)})
    with pytest.raises(CheckpointError, match=r"^a\.weight: computed from a\.parametrizations.*use adjust_model"):
        case.adjust(profile=replace(case.profile, header=header))


def test_a_profile_of_a_quantised_base_is_refused(case):
    name = "model.norm.weight"
    header = replace(case.profile.header, dtypes={**case.profile.header.dtypes, name: "uint8"})
    with pytest.raises(CheckpointError, match=rf"^{name}: .*uint8.*before it was quantised"):
        case.adjust(profile=replace(case.profile, header=header))


def test_a_full_disk_is_a_named_error_and_the_next_run_goes_on(case, monkeypatch):
    wanted = case.adjust(output=case.folder / "first")
    write, left = os.write, [30]

    def filling(descriptor, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(AdjustmentError, match="No space left on device.*the same call goes on from there"):
        case.adjust()
    monkeypatch.undo()
    assert not case.output.exists() and case.work.exists()
    assert case.adjust().parameters == wanted.parameters
    assert contents(case.output) == contents(case.folder / "first")


def test_every_error_is_the_packages_own(case):
    (case.tuned / INDEX).write_text(json.dumps({"weight_map": {"a": "../base/model.safetensors"}}))
    with pytest.raises(SafeDeltaError, match="no file of that folder"):
        case.adjust()
