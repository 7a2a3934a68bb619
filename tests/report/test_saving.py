import copy
import pickle

import pytest
import torch

from safedelta_hf.report.provenance import RECORD_FILE, read_provenance, write_provenance
from safedelta_hf.report.saving import follow_saving, is_adjusted
from tests.fixtures import tiny
from tests.report.test_report import report  # noqa: F401 - a fixture


def says(folder):
    return (folder / RECORD_FILE).exists()


def saved(model, folder):
    model.save_pretrained(folder)
    return says(folder)


def test_an_adjusted_model_says_so_wherever_it_is_saved_and_one_that_was_trained_on_does_not(report, tmp_path):  # noqa: F811
    model = tiny.llama()
    assert not saved(model, tmp_path / "before")
    follow_saving(model, report)
    assert is_adjusted(model) and saved(model, tmp_path / "one") and saved(model, tmp_path / "other")
    assert read_provenance(tmp_path / "one").is_of_weights and model.model_tags == ["safedelta"]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.001)
    assert not is_adjusted(model) and not saved(model, tmp_path / "one"), "also where it said so before"


def test_what_is_not_adjusted_takes_back_what_a_folder_said(report, tmp_path):  # noqa: F811
    model = tiny.llama()
    follow_saving(model, report)
    model.save_pretrained(tmp_path)
    follow_saving(model, None)
    assert (
        not saved(model, tmp_path)
        and model.model_tags == []
        and "Safety adj" not in (tmp_path / "README.md").read_text()
    )


def test_a_copy_saves_itself_and_says_what_it_is(report, tmp_path):  # noqa: F811
    model = tiny.llama()
    follow_saving(model, report)
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert saved(same, tmp_path / "same") and not saved(other, tmp_path / "other")
    assert not tiny.loaded(tmp_path / "other").lm_head.weight.any(), "the copy's own weights"
    assert tiny.same(tiny.weights(pickle.loads(pickle.dumps(model))), tiny.weights(model))


def test_following_twice_writes_once(report, tmp_path, monkeypatch):  # noqa: F811
    written = []
    monkeypatch.setattr(
        "safedelta_hf.report.saving.write_provenance", lambda *told: written.append(told) or write_provenance(*told)
    )
    model = tiny.llama()
    for _ in range(3):
        follow_saving(model, report)
    model.save_pretrained(tmp_path)
    assert len(written) == 1


def test_what_others_put_on_the_model_is_still_called(report, tmp_path):  # noqa: F811
    model, called = tiny.llama(), []
    inner = model.save_pretrained
    model.save_pretrained = lambda folder, **settings: called.append(folder) or inner(folder, **settings)
    follow_saving(model, report)
    assert saved(model, tmp_path) and called == [tmp_path]


def test_a_process_that_does_not_write_writes_nothing(report, tmp_path):  # noqa: F811
    model = tiny.llama()
    follow_saving(model, report, writes=False)
    assert not saved(model, tmp_path)


def test_a_module_without_save_pretrained_is_left_alone(report):  # noqa: F811
    module = torch.nn.Linear(2, 2)
    follow_saving(module, report)
    assert not is_adjusted(module) and "save_pretrained" not in vars(module)


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_record_of_an_adapter_lies_beside_its_weights(report, tmp_path, name):  # noqa: F811
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=name)
    follow_saving(model, report, adapter=name)
    model.save_pretrained(tmp_path)
    place = tmp_path if name == "default" else tmp_path / name
    assert read_provenance(place).is_of_weights and [*read_provenance(place).content["weights"]] == [
        "adapter_model.safetensors"
    ]
