"""All of an adjustment from files to files gives what the same steps in memory give."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from safedelta_hf import (
    ProfileConfig,
    Ridge,
    SafeDeltaCallback,
    SafetyProfile,
    Scale,
    TaskRidge,
    adjust_adapter,
    adjust_checkpoint,
    adjust_model,
    adjust_saved,
    collect_profile,
    with_ordinary,
)
from safedelta_hf.errors import (
    AdapterError,
    BaseWeightsError,
    CheckpointError,
    ConfigurationError,
    DataError,
    OutputError,
    ProfileError,
    SafeDeltaWarning,
)
from safedelta_hf.evaluation import sorting
from safedelta_hf.hf.profiles import examples_of
from safedelta_hf.saved import memory
from safedelta_hf.saved.folders import SavedModel
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.fixtures import adapters, checkpoints, refusing, tiny
from tests.fixtures.checkpoints import contents

HELD_OUT = ProfileConfig(holdout=0.25)
WHOLE = ProfileConfig(holdout=0.0)


def learned(model):
    """A LoRA that has learned the task and lost refusals."""
    return refusing._steps(model, refusing.TASK, 8, 2e-2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = refusing.base()
    checkpoints.save(base, folder / "base")
    checkpoints.save(refusing.fine_tuned(), folder / "tuned", "4KB")
    model = learned(adapters.adapted(base, scale=0.01))
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "work")


def adjust(folder, tuned="tuned", **settings):
    given = {"safety_dataset": refusing.REFUSALS, "device": "cpu", "progress": False} | settings
    if given["safety_dataset"] is not None:
        given = {"config": HELD_OUT} | given
    return adjust_saved(**{"tuned": folder / tuned, "output": folder / "output", "base": folder / "base"} | given)


def safety():
    return collect_profile(refusing.base(), refusing.REFUSALS, config=HELD_OUT, progress=False)


def task(**settings):
    return collect_profile(
        refusing.base(), refusing.TASK, config=WHOLE, purpose="task data", progress=False, **settings
    )


def test_a_model_is_adjusted_as_in_memory_with_the_same_strength(folder):
    before = {name: contents(folder / name) for name in ("base", "tuned")}
    report = adjust(folder, task_dataset=refusing.TASK)
    model = type(refusing.base()).from_pretrained(folder / "tuned")
    expected = adjust_model(
        model,
        base=refusing.base(),
        profile=safety(),
        task_profile=task(sorted_by=refusing.REFUSALS),
        progress=False,
    )
    checkpoints.save(model, folder / "expected", "4KB")
    assert report.rule.name == "task_ridge" and report.search == expected.search
    assert report.metrics() == expected.metrics() and report.sorting == expected.sorting
    written, wanted = (
        {n: d for n, d in contents(folder / one).items() if "safetensors" in n} for one in ("output", "expected")
    )
    assert len(written) > 2 and written == wanted
    assert {name: contents(folder / name) for name in ("base", "tuned")} == before
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base", "expected", "output", "tuned"]


def test_the_callback_writes_what_is_written_of_the_weights_that_it_kept(tmp_path):
    model = refusing.base()
    checkpoints.save(model, tmp_path / "base")
    given = {"task_dataset": refusing.TASK, "ordinary_dataset": tiny.rows(9, seed=8), "config": HELD_OUT}
    callback = SafeDeltaCallback(refusing.REFUSALS, keep_tuned=tmp_path / "tuned", **given)
    tiny.trainer(model, callback, tmp_path / "run").train()
    report = adjust(tmp_path, **given)
    assert tiny.same(load_file(tmp_path / "output" / "model.safetensors"), tiny.weights(model))
    assert report.search == callback.report.search and report.rule == callback.report.rule


def test_an_adapter_is_adjusted_as_in_memory_with_the_same_strength(folder):
    report = adjust(folder, "adapter")
    model = PeftModel.from_pretrained(refusing.base(), folder / "adapter")
    expected = adjust_adapter(model, profile=safety(), progress=False)
    assert report.search == expected.search and report.rule.name == "ridge" and not report.unverified
    written = load_file(folder / "output" / "adapter_model.safetensors")
    assert tiny.same(written, adapters.own_tensors(model))


def test_an_adapter_that_took_a_part_of_the_base_is_measured_on_the_base(folder):
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=adapters.LINEAR, init_lora_weights="pissa")
    model = get_peft_model(refusing.base(), settings)
    model.save_pretrained(folder / "initial")
    learned(model).save_pretrained(folder / "pissa")
    report = adjust(folder, "pissa", initial_adapter=folder / "initial")
    assert report.search.outcome == "found" and report.search.trials[0].lost > 0


def test_a_number_and_profiles_load_no_model(folder, monkeypatch):
    safety().save(folder / "profile")
    monkeypatch.setattr("safedelta_hf.saved.folders.load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("safedelta_hf.saved.adjust.load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(memory, "free_memory", lambda _: 0.0)
    report = adjust(folder, rule=Ridge(strength=2.0), safety_dataset=None, profile=folder / "profile")
    assert report.search is None and report.outcomes["adjusted"]


def test_a_profile_that_was_kept_serves_the_next_fine_tune(folder):
    ordinary = tiny.rows(9, seed=8)
    first = adjust(folder, ordinary_dataset=ordinary, ordinary_weight=0.3, save_profile=folder / "profile")
    plain = collect_profile(refusing.base(), ordinary, config=WHOLE, progress=False)
    expected, found = with_ordinary(safety(), plain, 0.3), SafetyProfile.load(folder / "profile")
    assert found.header == expected.header and found.held_out == expected.held_out
    written = contents(folder / "output")
    shutil.rmtree(folder / "output")
    again = adjust(folder, safety_dataset=None, profile=folder / "profile")
    assert again == first and contents(folder / "output") == written


def test_a_task_that_is_refused_whole_is_no_task(folder, monkeypatch):
    prompted = [row | {"labels": [-100, -100, *row["labels"][2:]]} for row in refusing.REFUSALS]
    monkeypatch.setattr(sorting, "refusal_probabilities", lambda _, prompts, *__, **___: [0.9] * len(prompts))
    monkeypatch.setattr(sorting, "MOST", 0.0)  # they look harmful
    with pytest.warns(SafeDeltaWarning, match="Nothing is left"):
        report = adjust(folder, safety_dataset=prompted, task_dataset=prompted, rule=TaskRidge(strength=2.0))
    assert report.sorting.is_empty and report.rule.name == "ridge"
    shutil.rmtree(folder / "output")
    assert replace(report, sorting=None) == adjust(folder, safety_dataset=prompted, rule=Ridge(strength=2.0))


def test_of_a_long_file_as_many_rows_are_drawn_as_the_callback_draws(folder):
    rows = tiny.rows(40, seed=6)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = adjust(folder, task_dataset=folder / "train.jsonl", task_examples=7, rule=TaskRidge(strength=1.0))
    shutil.rmtree(folder / "output")
    drawn = examples_of(rows, 7)
    assert len(drawn) == 7 != len(rows)
    assert report == adjust(folder, task_dataset=drawn, rule=TaskRidge(strength=1.0))


def test_what_does_not_fit_is_refused_before_anything_is_read(folder, monkeypatch):
    needed = memory.bytes_needed(SafetensorsFiles(folder / "tuned"))
    monkeypatch.setattr(memory, "free_memory", lambda _: needed - 1.0)
    monkeypatch.setattr("safedelta_hf.saved.adjust.read_safety_data", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ConfigurationError, match="tuned' takes .* GB.*cannot be loaded to read data.*--profile"):
        adjust(folder)
    safety().save(folder / "profile")
    with pytest.raises(ConfigurationError, match=r"cannot be loaded to measure a strength.*--strength"):
        adjust(folder, safety_dataset=None, profile=folder / "profile")
    assert not (folder / "output").exists()


def test_a_profile_of_ordinary_data_is_added_to_whatever_profile_of_the_safety_data_there_is(folder):
    ordinary = tiny.rows(9, seed=8)
    safety().save(folder / "profile")
    collect_profile(refusing.base(), ordinary, config=WHOLE, progress=False).save(folder / "ordinary")
    rule = {"rule": Ridge(strength=1.0), "ordinary_weight": 0.3}
    adjust(folder, ordinary_dataset=ordinary, **rule, output=folder / "read")
    made = {"ordinary_profile": folder / "ordinary", **rule}
    adjust(folder, **made)
    adjust(folder, **made, safety_dataset=None, profile=folder / "profile", output=folder / "given")
    found = [checkpoints.tensors(folder / name) for name in ("read", "output", "given")]
    plain = adjust(folder, **rule, output=folder / "plain")
    for one in found[1:]:
        for name, value in one.items():
            torch.testing.assert_close(value, found[0][name])
    assert plain.outcome == "adjusted" and not tiny.same(found[0], checkpoints.tensors(folder / "plain"))


def test_the_memory_is_that_of_the_weights_and_four_copies_of_the_largest(folder):
    model = refusing.base()
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    assert memory.bytes_needed(SafetensorsFiles(folder / "tuned")) == sum(sizes) + 4 * max(sizes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"safety_dataset": None}, ConfigurationError, "give either safety_dataset or profile"),
        ({"profile": "nowhere"}, ConfigurationError, "give either safety_dataset or profile"),
        ({"base": None}, ConfigurationError, "base: a whole model needs it"),
        ({"initial_adapter": "x"}, ConfigurationError, "holds no adapter"),
        ({"rule": Ridge(), "task_dataset": refusing.TASK}, ConfigurationError, "ridge does not weigh the task"),
        ({"rule": "task_ridge"}, ConfigurationError, "task_ridge weighs what.*--task-data"),
        ({"safety_dataset": refusing.REFUSALS[:9], "config": None}, DataError, "give at least 16 refusals"),
        ({"device": "abacus"}, ConfigurationError, "device='abacus' cannot be used"),
        ({"ordinary_weight": 0}, ConfigurationError, "adjust_saved: ordinary_weight=0"),
        (
            {"ordinary_dataset": refusing.TASK, "ordinary_profile": "x"},
            ConfigurationError,
            "either ordinary_dataset or",
        ),
        (
            {"safety_dataset": None, "rule": Scale(strength=1.0), "ordinary_profile": "x"},
            ConfigurationError,
            "ordinary_profile has no effect without",
        ),
        (
            {"safety_dataset": None, "rule": Scale(strength=1.0), "config": WHOLE},
            ConfigurationError,
            "config has no effect where no data is read",
        ),
        (
            {"safety_dataset": None, "profile": "x", "rule": Ridge(strength=1.0), "config": ProfileConfig()},
            ConfigurationError,
            "config has no effect where no data is read",
        ),
        (
            {"safety_dataset": None, "profile": "x", "task_dataset": refusing.TASK, "config": HELD_OUT},
            ConfigurationError,
            r"config=ProfileConfig\(holdout=0.25\) has no effect without safety_dataset",
        ),
        ({"output": None}, ConfigurationError, "output=None must be a folder"),
        ({"safety_dataset": None, "profile": "nowhere/at/all"}, ProfileError, "there is no folder"),
        ({"output": "/proc/nowhere/output"}, OutputError, "cannot be written: nothing can be made in"),
        ({"save_profile": "/proc/nowhere/profile"}, OutputError, "cannot be written: nothing can be made in"),
        ({"base": "nowhere"}, BaseWeightsError, "base: 'nowhere'"),
        ({"tuned": "nowhere"}, CheckpointError, "tuned: 'nowhere' is no folder"),
    ],
)
def test_what_cannot_be_done_is_a_named_error(folder, changes, error, message):
    given = {
        "tuned": folder / "tuned",
        "output": folder / "output",
        "base": folder / "base",
        "safety_dataset": refusing.REFUSALS,
        "progress": False,
    }
    with pytest.raises(error, match=message):
        adjust_saved(**given | changes)
    assert not (folder / "output").exists()


def test_what_stands_in_the_way_is_found_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr("safedelta_hf.saved.adjust.read_safety_data", lambda *_, **__: pytest.fail("it was read"))
    (folder / "output").mkdir()
    for tuned, error in (("tuned", CheckpointError), ("adapter", AdapterError)):
        with pytest.raises(error, match="exists already"):
            adjust(folder, tuned)
    (folder / "output").rmdir()
    with pytest.raises(ConfigurationError, match="is only read"):
        adjust(folder, output=folder / "tuned" / "inner")
    get_peft_model(refusing.base(), adapters.config(use_dora=True)).save_pretrained(folder / "dora")
    with pytest.raises(AdapterError, match="use_dora"):
        adjust(folder, "dora")


def test_a_profile_of_another_base_is_found_before_data_are_read(folder, monkeypatch):
    monkeypatch.setattr(
        "safedelta_hf.hf.profiles.collect_profile", lambda *_, **__: pytest.fail("data were read with the base")
    )
    other = collect_profile(refusing.fine_tuned(), refusing.REFUSALS, config=HELD_OUT, progress=False)
    none = {"safety_dataset": None, "config": None}
    for changes, name in (
        ({"ordinary_profile": other}, "ordinary_profile"),
        ({"task_profile": other, "rule": TaskRidge(strength=1.0)}, "task_profile"),
        ({"profile": other, "task_dataset": refusing.TASK, "rule": TaskRidge(strength=1.0)} | none, "profile"),
    ):
        with pytest.raises(ProfileError, match=f"adjust_saved: {name} was made of another base"):
            adjust(folder, **changes)
    assert not (folder / "output").exists()


def test_base_and_tuned_that_were_exchanged_are_found_where_the_folders_say_so(folder):
    exchanged = {"base": folder / "tuned", "rule": Scale(strength=1.0), "safety_dataset": None}
    settings = json.loads((folder / "tuned" / "config.json").read_text())
    (folder / "tuned" / "config.json").write_text(json.dumps(settings | {"_name_or_path": str(folder / "base")}))
    with pytest.raises(ConfigurationError, match=r"config.json' says .* made from .*: the two are exchanged"):
        adjust(folder, "base", **exchanged)
    with pytest.raises(ConfigurationError, match="the two are exchanged"):
        adjust_checkpoint(
            base=folder / "tuned", tuned=folder / "base", output=folder / "output", rule=Scale(strength=1.0)
        )
    (folder / "tuned" / "config.json").write_text(json.dumps(settings))
    (folder / "tuned" / "training_args.bin").touch()
    with pytest.warns(SafeDeltaWarning, match="holds training_args.bin.*if the two are exchanged"):
        adjust(folder, "base", **exchanged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SafeDeltaWarning)
        adjust(folder, rule=Scale(strength=1.0), safety_dataset=None, output=folder / "right")


def test_a_base_of_another_size_is_found_before_it_is_read(folder):
    checkpoints.save(tiny.llama(vocab_size=56), folder / "resized")
    with pytest.raises(BaseWeightsError, match="was the vocabulary resized"):
        adjust(folder, base=folder / "resized")


def test_a_difference_between_what_is_measured_and_written_is_told(folder, monkeypatch):
    measured = SavedModel.measured

    def other(self, base, work):
        report = measured(self, base, work)
        parameters = tuple(replace(one, lost_energy=one.lost_energy * 1.1 + 1) for one in report.parameters)
        return replace(report, parameters=parameters)

    monkeypatch.setattr(SavedModel, "measured", other)
    with pytest.warns(UserWarning, match="what was written differs by more than 1%"):
        adjust(folder)
