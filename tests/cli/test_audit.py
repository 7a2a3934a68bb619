import json

import pytest
from typer.testing import CliRunner

from safedelta_hf.cli.audit import TOO_MANY
from safedelta_hf.cli.main import app
from safedelta_hf.evaluation import audit_data
from safedelta_hf.testbed import ALIGNED_MODEL, CASES, load_aligned, safety_data

ROWS = CASES["mixed"].examples(0)[:30]


@pytest.fixture
def files(tmp_path):
    for name, rows in {"train": [*ROWS, {"text": "sure"}], "refusals": safety_data(16)}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def run(files, *options, model=ALIGNED_MODEL):
    given = [f"--model={model}", f"--task-data={files / 'train.jsonl'}", f"--safety-data={files / 'refusals.jsonl'}"]
    return CliRunner().invoke(app, ["audit", *given, f"--output={files / 'audit.jsonl'}", *options])


def test_it_writes_a_line_for_each_row_and_tells_the_sum(files):
    result = run(files)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (files / "audit.jsonl").read_text().splitlines()]
    model, tokenizer = load_aligned()
    expected = audit_data(model, files / "train.jsonl", files / "refusals.jsonl", tokenizer, progress=False)
    assert [line["probability"] for line in lines] == [one.probability for one in expected.rows]
    assert lines[0]["place"] == "train.jsonl line 1" and lines[-1]["refused"] is None
    assert f"31 rows, 30 judged: the base would refuse {len(expected.refused)}" in result.output
    assert "Not judged: 1 rows, such as train.jsonl line 31" in result.output


def test_a_share_above_what_a_gate_allows_has_a_status_of_its_own_and_the_file_is_there(files):
    result = run(files, "--fail-above=0.01")
    assert result.exit_code == TOO_MANY and (files / "audit.jsonl").exists()
    (files / "audit.jsonl").unlink()
    assert run(files, "--fail-above=1").exit_code == 0


def test_an_output_that_is_there_stays_as_it_is(files):
    (files / "audit.jsonl").write_text("precious")
    result = run(files)
    assert result.exit_code == 1 and "exists already" in result.output
    assert (files / "audit.jsonl").read_text() == "precious"


def test_a_model_that_cannot_be_loaded_is_one_line(files):
    result = run(files, model="nowhere/at-all")
    assert result.exit_code == 1 and result.output.startswith("safedelta: --model 'nowhere/at-all'")
