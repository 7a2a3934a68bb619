"""A run that has ended without an adjustment does not look like one that has."""

import json

import pytest
from huggingface_hub import RepoCard
from transformers import Trainer

from safedelta_hf import Ridge, SafeDelta, SafeDeltaCallback
from safedelta_hf.errors import AdjustmentError
from safedelta_hf.integrations.running import REPORT, tell
from safedelta_hf.integrations.settings import Settings
from safedelta_hf.report.provenance import CARD_FILE, TAG
from tests.fixtures import tiny


def test_a_run_without_training_is_an_error(tmp_path):
    with pytest.raises(AdjustmentError, match="nothing was adjusted"):
        tell(SafeDeltaCallback(tiny.conversations(), rule="safe_delta"), tmp_path)
    assert not (tmp_path / REPORT).exists()


def test_the_report_is_beside_the_model(tmp_path, capsys, llama, safety_rows):
    callback = Settings(safety_dataset=safety_rows, rule=SafeDelta()).callback()
    tiny.trainer(llama, callback, tmp_path, disable_tqdm=False).train()
    tell(callback, tmp_path)
    assert json.loads((tmp_path / REPORT).read_text()) == json.loads(json.dumps(callback.report.to_dict()))
    out, err = capsys.readouterr()
    assert out.endswith(f"Safe Delta: {callback.report.summary()}\nThe whole report: {tmp_path / REPORT}\n")
    assert (out + err).count(callback.report.told) == 1


def test_a_card_that_the_class_wrote_gets_its_section_back(tmp_path, llama, safety_rows):
    callback = Settings(safety_dataset=safety_rows, rule=SafeDelta()).callback()
    trainer = tiny.trainer(llama, callback, tmp_path)
    trainer.train()
    trainer.save_model()
    Trainer.create_model_card(trainer, tags=["mine"])  # as LLaMA-Factory does
    card = tmp_path / CARD_FILE
    assert "Safety adjustment" not in card.read_text()
    tell(callback, tmp_path)
    assert "Safety adjustment" in card.read_text() and {"mine", TAG} <= set(RepoCard.load(card).data.tags)


def test_a_change_of_nothing_is_said_once(tmp_path, llama, safety_rows, capsys, caplog):
    callback = Settings(safety_dataset=safety_rows, rule=Ridge(strength=0.0)).callback()
    tiny.trainer(llama, callback, tmp_path).train()
    tell(callback, tmp_path)
    assert "Nothing was changed" in capsys.readouterr().out and "no weight was changed" not in caplog.text
