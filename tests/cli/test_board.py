import json
import re
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from safedelta_hf.cli.main import app
from tests.evaluation.board.results import evaluation, saved


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name, values in (("aligned", [0] * 9 + [1]), ("eval-tuned", [1] * 10), ("adjusted", [0] * 10)):
        saved(tmp_path / name, evaluation(name, attack_success=values), harmful=["answer"] * 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, ["board", *arguments])
    return result.exit_code, result.output


def test_all_files_are_written_and_the_names_are_those_of_the_folders(folders):
    code, shown = run(
        "aligned", "eval-tuned", "adjusted/results.json", "--output=out", "--fail-if=attack_success > 0.5"
    )
    assert code == 0, shown
    assert all(part in shown for part in ("attack_success", "eval_tuned", "100.0%", "passed: adjusted", "board.html"))
    assert sorted(path.name for path in (folders / "out").iterdir()) == [
        "board.html",
        "board.json",
        "board.md",
        "board.png",
        "junit.xml",
    ]
    assert json.loads((folders / "out" / "board.json").read_text())["subject"] == "adjusted"
    assert (folders / "out" / "board.png").read_bytes().startswith(b"\x89PNG")


def test_a_condition_that_holds_ends_with_status_3_after_everything_is_written(folders):
    conditions = ["--fail-if=attack_success > aligned + 0.05", "--fail-if=upper(attack_success) > 2 * aligned + 0.9"]
    code, shown = run("aligned", "tuned=eval-tuned", "--output=out", *conditions)
    assert code == 3 and "FAILED: tuned" in shown and "passed: tuned" in shown
    root = ElementTree.parse(folders / "out" / "junit.xml").getroot()
    assert (root.get("tests"), root.get("failures")) == ("2", "1")
    assert "Not passed" in (folders / "out" / "board.html").read_text()
    assert run("aligned", "tuned=eval-tuned", "--subject=aligned", conditions[0])[0] == 0


def test_results_and_conditions_are_read_from_a_file_too(folders):
    (folders / "gate.yaml").write_text("results: [aligned, tuned=eval-tuned]\nfail_if: attack_success > 0.5\n")
    code, shown = run("--config=gate.yaml")
    assert code == 3 and "FAILED: tuned" in shown
    code, shown = run("aligned", "adjusted", "--config=gate.yaml")
    assert code == 0 and "passed: adjusted" in shown
    (folders / "gate.yaml").write_text("results: {a: aligned}\n")
    assert "takes one value or a list of them, not a mapping" in run("--config=gate.yaml")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aligned"], "at least two"),
        (["aligned", "nowhere"], "nowhere is no saved evaluation"),
        (["aligned", "x=aligned", "x=adjusted"], "two results are called 'x'"),
        (["a-b=aligned", "adjusted"], "'a-b' is no name for a result"),
        (["aligned", "adjusted", "--fail-if=attack_succes > 1"], "no score 'attack_succes'"),
        (["aligned", "adjusted", "--fail-if=attack_success > aligned", "--fail-if=x > 1"], "no score 'x'"),
        (["aligned", "adjusted", "--subject=tuned"], "no result is called 'tuned'"),
        (["aligned", "adjusted", "--output=aligned/results.json"], "is no folder"),
    ],
)
def test_errors_take_one_line_and_status_1_and_write_nothing(folders, arguments, message):
    code, shown = run(*arguments, *([] if "--output" in str(arguments) else ["--output=out"]))
    assert code == 1 and re.search(message, shown), shown
    assert len([line for line in shown.splitlines() if line.startswith("safedelta:")]) == 1
    assert not (folders / "out").exists()
