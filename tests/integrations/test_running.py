"""A run that has ended without an adjustment does not look like one that has."""

import json

import pytest

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.errors import AdjustmentError
from safedelta_hf.integrations.running import REPORT, tell
from tests.fixtures import tiny


def test_a_run_without_training_is_an_error(tmp_path):
    with pytest.raises(AdjustmentError, match="nothing was adjusted"):
        tell(SafeDeltaCallback(tiny.conversations(), rule="safe_delta"), tmp_path)
    assert not (tmp_path / REPORT).exists()


def test_the_report_is_beside_the_model(tmp_path, capsys, llama, safety_rows):
    callback = SafeDeltaCallback(safety_rows, rule="safe_delta")
    tiny.trainer(llama, callback, tmp_path).train()
    tell(callback, tmp_path)
    assert json.loads((tmp_path / REPORT).read_text()) == json.loads(json.dumps(callback.report.to_dict()))
    assert callback.report.summary() in capsys.readouterr().out
