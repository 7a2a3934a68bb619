"""What is on disk, and on a Hub, after a run with the callback."""

import re

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from safedelta_hf import SafeDelta, SafeDeltaCallback
from safedelta_hf.hf.trainer_facts import put_before_trackers, trainer_of
from safedelta_hf.report.provenance import RECORD_FILE, read_provenance, write_provenance
from tests.fixtures import tiny
from tests.fixtures.fake_hub import connected

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=3.0)


def ran(output, callback=None, model=None, **settings):
    trainer = tiny.trainer(model or tiny.llama(), callback or SafeDeltaCallback(ROWS, RULE), output, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_what_is_pushed_says_what_it_is_and_its_checkpoints_do_not(tmp_path, monkeypatch, strategy):
    output = tmp_path / "run"
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of the last Hub
    with connected(monkeypatch) as hub:
        hub_settings = {"push_to_hub": True, "hub_model_id": "org/tuned", "hub_strategy": strategy, "hub_token": "hf_x"}
        trainer = ran(output, save_strategy="epoch", **hub_settings)
        assert RECORD_FILE not in hub.files("org/tuned")[0]
        trainer.push_to_hub(blocking=True)
        files = hub.files("org/tuned")[0]
        trainer.model.push_to_hub("org/alone", token="hf_x")
        alone = hub.files("org/alone")[0]
    for found in (files, alone):
        card = found["README.md"].decode()
        assert RECORD_FILE in found and "## Safety adjustment" in card and "- safedelta" in card
    assert "library_name: transformers" in files["README.md"].decode(), "the Trainer's own card"
    assert read_provenance(output).is_of_weights
    assert not list(output.glob(f"checkpoint-*/{RECORD_FILE}"))
    for name, content in files.items():
        (tmp_path / "fetched" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)
    assert read_provenance(tmp_path / "fetched").is_of_weights


class Saves(TrainerCallback):
    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(args.output_dir)


def test_what_a_run_saves_before_its_adjustment_takes_back_what_the_folder_said(tmp_path):
    trainer = ran(tmp_path)
    trainer.save_model()
    trainer.create_model_card()
    assert read_provenance(tmp_path).is_of_weights and "Safety adj" in (tmp_path / "README.md").read_text()
    trainer.add_callback(Saves())
    trainer.callback_handler.callbacks.remove(
        next(one for one in trainer.callback_handler.callbacks if isinstance(one, SafeDeltaCallback))
    )
    trainer.train()
    assert read_provenance(tmp_path) is None and "Safety adj" not in (tmp_path / "README.md").read_text()


def test_a_push_of_a_checkpoint_takes_back_what_the_folder_said(tmp_path):
    callback = SafeDeltaCallback(ROWS, RULE)
    trainer = ran(tmp_path, callback)
    trainer.save_model()
    report = callback.report
    handler = trainer.callback_handler
    handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert read_provenance(tmp_path).is_of_weights
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert read_provenance(tmp_path) is None
    write_provenance(tmp_path, report)


def test_an_adapter_that_was_trained_says_so(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = ran(tmp_path, model=model, save_strategy="epoch")
    trainer.save_model()
    assert read_provenance(tmp_path).is_of_weights and not list(tmp_path.glob(f"checkpoint-*/{RECORD_FILE}"))
    trainer.create_model_card()
    assert "Safety adj" in (tmp_path / "README.md").read_text()


def test_trackers_come_after_the_callback_and_nobody_else_moves(tmp_path):
    callback, early = SafeDeltaCallback(ROWS, RULE), EarlyStoppingCallback()
    trainer = tiny.trainer(tiny.llama(), None, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    tracker, after = TensorBoardCallback(), Saves()
    for one in (tracker, early, callback, after):
        trainer.add_callback(one)
    others = [one for one in trainer.callback_handler.callbacks if one is not tracker]
    put_before_trackers(callback, trainer)
    found = trainer.callback_handler.callbacks
    assert [one for one in found if one is not tracker] == others
    assert found.index(tracker) == found.index(callback) + 1 and found[: len(before) - 1] == before[:-1]
    assert trainer_of(trainer.state) is trainer


def test_one_bar_for_a_repair_and_one_sentence_instead_of_a_dictionary(tmp_path, capsys):
    callback = SafeDeltaCallback(tiny.rows(96, seed=1), "ridge")
    ran(tmp_path, callback, disable_tqdm=False)
    out, err = capsys.readouterr()
    assert "safedelta/" not in out + err and out.count("Safe Delta: ") == 1
    assert "Trial 1 of about 8" in err and err.count("Adjusted: ") == 1
    assert "Adjusting (" not in err and "Likelihood" not in err
    assert re.search(r"Trial 2 of about 8 \(\S+ (passes|fails)\)", err) or "Trial 2" not in err
    ran(tmp_path / "quiet", SafeDeltaCallback(ROWS, RULE), disable_tqdm=True)
    out, err = capsys.readouterr()
    assert "Adjust" not in err and "Safe Delta: " not in out
