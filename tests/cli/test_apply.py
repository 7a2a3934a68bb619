import json

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from safedelta_hf import SafeDelta, SafetyProfile, adjust_adapter
from safedelta_hf.cli.main import app
from tests.fixtures import adapters, refusing, tiny


@pytest.fixture
def folder(tmp_path):
    adapters.profile_of(tiny.llama()).save(tmp_path / "profile")
    adapters.adapted(tiny.llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path


def apply(folder, *options):
    paths = [f"--{name}={folder / name}" for name in ("adapter", "profile", "output")]
    return CliRunner().invoke(app, ["apply", *paths, *map(str, options)])


def apply_safe_delta(folder, *options):
    return apply(folder, "--rule", "safe_delta", *options)


def test_it_writes_the_adjusted_adapter_and_a_report(folder):
    result = apply_safe_delta(folder, "--strength", 100, "--report", folder / "report.json")
    assert result.exit_code == 0, result.output
    assert "14 weights adjusted" in result.output
    model = adapters.adapted(tiny.llama())
    profile = SafetyProfile.load(folder / "profile")
    adjust_adapter(model, profile=profile, rule=SafeDelta(strength=100.0), progress=False)
    assert tiny.same(load_file(folder / "output" / "adapter_model.safetensors"), adapters.own_tensors(model))
    report = json.loads((folder / "report.json").read_text())
    assert report["rule"]["settings"]["strength"] == 100
    assert not list((folder / "output").glob("*report*"))


def test_errors_end_with_one_line_and_status_1(folder):
    (folder / "output").mkdir()
    for options, message in (
        (["--rule", "magic"], "--rule 'magic' is not one of"),
        (["--strength", "-1"], "must be a number at least 0"),
        ([], "exists already"),
    ):
        result = apply_safe_delta(folder, *options)
        assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not list((folder / "output").iterdir())


def test_a_report_that_cannot_be_written_is_found_before_the_work(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("safedelta_hf.saved.adjust.adjust_saved", lambda *_, **__: pytest.fail("the work was done"))
        for report in (folder / "absent" / "report.json", folder):
            result = apply_safe_delta(folder, "--report", report)
            assert result.exit_code == 1 and f"--report {str(report)!r}" in result.output, result.output
    (folder / "report.json.part").mkdir()  # stands where the report is made
    result = apply_safe_delta(folder, "--report", folder / "report.json")
    assert result.exit_code == 1 and "is complete without it" in result.output and (folder / "output").exists()


def test_a_rule_that_merges_weights_is_refused_in_one_line(folder):
    result = apply(folder, "--rule", "ties", "--strength", 1)
    assert result.exit_code == 1 and "ties merges whole weights" in result.output and "Traceback" not in result.output
    assert not (folder / "output").exists()


def test_a_base_and_an_initial_adapter_are_passed_on(folder):
    result = apply_safe_delta(folder, "--initial-adapter", folder / "adapter")
    assert result.exit_code == 1 and "nothing has to be subtracted" in result.output
    model = adapters.adapted(tiny.llama(), modules_to_save=["lm_head"])
    model.save_pretrained(folder / "adapter")
    result = apply_safe_delta(folder)
    assert result.exit_code == 1 and "--base on the command line" in result.output
    tiny.llama().save_pretrained(folder / "base")
    result = apply_safe_delta(folder, "--base", folder / "base")
    assert result.exit_code == 0 and "15 weights adjusted" in result.output, result.output


def test_the_default_rule_is_that_of_every_entry_and_is_measured(folder):
    for options, rule in (([], "ridge"), (["--task-profile", folder / "profile"], "task_ridge")):
        result = apply(folder, *options)
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1
        assert result.output.startswith(f"safedelta: {rule}: strength='auto'") and "was held out" in result.output
    assert not (folder / "output").exists()
    result = apply(folder, "--strength", 2, "--report", folder / "report.json")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "report.json").read_text())["rule"] == {"name": "ridge", "settings": {"strength": 2}}


def test_data_are_read_with_the_base_and_the_strength_is_measured(tmp_path):
    refusing.base().save_pretrained(tmp_path / "base")
    refusing.fine_tuned().save_pretrained(tmp_path / "tuned")
    data = {"safety": refusing.REFUSALS, "task": refusing.TASK, "ordinary": tiny.rows(9, seed=8)}
    for name, rows in data.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [f"--{name}={tmp_path / name}" for name in ("base", "tuned", "output")]
    read = [f"--{name}-data={tmp_path / name}.jsonl" for name in data]
    more = ["--ordinary-weight=0.2", "--no-sort-task", "--batch-size=3", "--max-length=4", "--device=cpu"]
    kept = f"--save-profile={tmp_path / 'profile'}"
    result = CliRunner().invoke(app, ["apply", *paths, *read, *more, kept, f"--report={tmp_path / 'report.json'}"])
    assert result.exit_code == 0 and result.output.rstrip().endswith(f"Written: {tmp_path / 'output'}"), result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rule"]["name"] == "task_ridge" and report["search"]["trials"] and report["sorting"] is None
    header = SafetyProfile.load(tmp_path / "profile").header
    assert (header.retention.weight, header.tokens) == (0.2, 4 * header.sequences)
    assert load_file(tmp_path / "output" / "model.safetensors").keys() == refusing.base().state_dict().keys()
