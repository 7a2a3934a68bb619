import dataclasses
import json
import os

import pytest

from safedelta_hf import Report
from safedelta_hf.errors import OutputError
from safedelta_hf.records import Outcome, ParameterRecord, RefusedExample, RuleRecord, TaskSorting


@pytest.fixture
def report():
    return Report(
        rule=RuleRecord(name="safe_delta", settings={"strength": 0.1}),
        architecture="LlamaForCausalLM",
        base="org/aligned",
        sequences=3,
        tokens=30,
        parameters=(
            ParameterRecord(
                parameter="a.weight",
                shape=(2, 3),
                outcome="adjusted",
                roles=("linear",),
                delta_energy=4.0,
                lost_energy=1.0,
                tuned_loss=8.0,
                adjusted_loss=2.0,
                notes=("factorised in float64 after float32 failed",),
            ),
            ParameterRecord(
                parameter="b.weight", shape=(2,), outcome="reset", reason="no layer", delta_energy=4.0, lost_energy=4.0
            ),
            ParameterRecord(parameter="c.weight", shape=(2,), outcome="unchanged"),
        ),
    )


def test_metrics_are_sums_over_all_parameters(report):
    metrics = report.metrics()
    assert metrics["safedelta/kept_share"] == pytest.approx(1 - 5 / 8)
    assert metrics["safedelta/quadratic_loss_share"] == pytest.approx(0.25)
    assert metrics["safedelta/parameters_reset"] == 1
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_table_names_every_parameter_and_reason(report):
    for text in ("a.weight", "b.weight", "c.weight", "no layer", "float64", "2x3", "75.0%", "37.5%"):
        assert text in str(report)


def test_long_names_are_never_cut(report):
    name = "model.layers.31.block_sparse_moe.experts.127.gate_up_projection.weight"
    record = dataclasses.replace(report.parameters[1], parameter=name, reason="a long reason " * 12)
    table = dataclasses.replace(report, parameters=(record,)).table()
    first_column = "".join(line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│"))
    assert first_column == name


def test_json_holds_everything(report, tmp_path):
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert [record["parameter"] for record in content["parameters"]] == ["a.weight", "b.weight", "c.weight"]
    assert content["rule"] == {"name": "safe_delta", "settings": {"strength": 0.1}}
    assert content["metrics"] == report.metrics()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_is_a_named_error_and_leaves_the_report_that_was_there(report, tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(28, "No space left on device")

    report.save(tmp_path / "report.json")
    before = (tmp_path / "report.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OutputError, match=r"report\.json' cannot be written .*No space left"):
            dataclasses.replace(report, base="other").save(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_model_card_lists_what_was_not_adjusted(report):
    card = report.model_card()
    assert card.startswith("## ") and "`b.weight`: reset (no layer)" in card and "org/aligned" in card
    assert "a.weight" not in card and "not a measured refusal rate" in card


def sorting(**changes):
    shown = (RefusedExample(row=7, probability=0.98, prompt="how do i make a bomb ?"),)
    values = {"outcome": Outcome.SORTED, "examples": 9, "refused": 2, "near": None, "left_out": 2, "unjudged": 0}
    return TaskSorting(**{"shown": shown, **values, **changes})


def test_a_report_says_what_was_left_out_of_the_task_and_shows_it(report):
    told = dataclasses.replace(report, sorting=sorting())
    assert "would refuse 2 of 9 examples; 2 left out" in told.summary() and not told.warning
    assert "row 7 (0.980): how do i make a bomb ?" in told.table()
    assert "bomb" not in told.model_card() and "2 left out" in told.model_card()  # a card is public
    assert told.metrics() == report.metrics() | {"safedelta/task_examples": 9.0, "safedelta/task_left_out": 2.0}
    assert json.loads(json.dumps(told.to_dict()))["sorting"]["shown"][0]["row"] == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outcome": Outcome.HARMFUL, "refused": 5, "near": 4, "left_out": 5}, "the data looks harmful: 5 left out"),
        ({"outcome": Outcome.OVER_REFUSAL, "refused": 9, "near": 0, "left_out": 0}, "refuse too much: none left out"),
        ({"outcome": Outcome.UNKNOWN, "refused": 9, "left_out": 0}, "nothing tells"),
        ({"refused": 9, "left_out": 9}, "Nothing is left"),
    ],
)
def test_what_has_to_be_decided_about_a_task_is_a_warning(report, changes, words):
    told = dataclasses.replace(report, sorting=sorting(**changes))
    assert words in told.warning and words in told.summary()


def test_examples_that_could_not_be_judged_are_counted_without_a_warning(report):
    told = dataclasses.replace(report, sorting=sorting(refused=0, left_out=0, unjudged=9))
    assert "Of 9 no prompt could be told" in told.summary() and not told.warning
