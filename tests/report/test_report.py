import dataclasses
import html.parser
import json
import math
import os
import sys

import pytest

from safedelta_hf import Report
from safedelta_hf.errors import ConfigurationError, OutputError
from safedelta_hf.records.sorting import Outcome, RefusedExample, TaskSorting
from safedelta_hf.report.records import ParameterRecord, RuleRecord
from safedelta_hf.report.search import StrengthSearch, Trial


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
    for text in ("a.weight", "b.weight", "c.weight", "no layer", "float64", "2x3", "50 %", "8 -> 2"):
        assert text in report.table()


def test_what_the_rule_keeps_whole_is_not_told_as_adjusted(report):
    kept = [dataclasses.replace(report.parameters[0], parameter=name, lost_energy=0.0) for name in ("d", "e")]
    told = dataclasses.replace(report, parameters=(*report.parameters, *kept))
    assert "1 weight adjusted, 2 left as tuned, 1 reset" in told.summary()
    whole = dataclasses.replace(report, parameters=tuple(kept))
    for text in (str(whole), whole.table(), whole._repr_html_()):
        assert "left as tuned" in text and "adjusted" not in text.replace("Nothing was adjusted", "")


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


def search(outcome="found", probability_lost=0.002, lost=0, strength=3.2, **changes):
    losses = {0.0: (9, 0.4), strength: (lost, probability_lost)}
    trials = [
        Trial(strength=one, lost=count, probability_lost=mean, probability_lost_bound=1.5 * mean, passed=one > 0)
        for one, (count, mean) in losses.items()
    ]
    values = {"share": 0.05, "confidence": 0.95, "examples": 64, "others": 0, "allowed": 0, "bound": 0.046}
    return StrengthSearch(
        **{
            **values,
            "outcome": outcome,
            "strength": strength,
            "holds": True,
            "more": 0,
            "trials": tuple(trials),
            **changes,
        }
    )


def layered(layers=32, experts=3):
    """Records of a model with many layers, every kind of weight moved by its own share."""
    kinds = ["self_attn.q_proj.weight", *(f"mlp.experts.{number}.up_proj.weight" for number in range(experts))]
    return tuple(
        ParameterRecord(
            parameter=f"model.layers.{layer}.{kind}", shape=(4, 4), outcome="adjusted", roles=("linear",),
            delta_energy=4.0, lost_energy=1.0, tuned_loss=2.0, adjusted_loss=1.0,
        )
        for layer in range(layers)
        for kind in kinds
    )  # fmt: skip


def test_the_summary_says_what_became_of_refusals_weights_and_strength_in_sentences(report):
    told = dataclasses.replace(report, search=search(), parameters=layered(2)).summary()
    assert told.startswith(
        "Refusals: as likely as in the base (limit 5 % less); 0 of 64 held-out ones lost (limit 0; 9"
    )
    assert "Strength 3.2, measured in 2 trials." in told and "at most 4.6 % of refusals like these are lost" in told
    assert "Moved 50 % of the way back. 8 weights adjusted." in told
    less = dataclasses.replace(report, search=search(probability_lost=0.031))
    assert "Refusals: 3.1 % less likely than in the base (at most 4.65 %, limit 5 % less); 0 of" in less.summary()
    assert "Refusals: not measured; of the fine-tuned model's estimated safety loss 25 % is left." in report.summary()


@pytest.mark.parametrize("lost", [5.0, 40.0])
def test_a_share_below_nothing_or_above_all_is_in_no_sentence(report, lost):
    record = dataclasses.replace(report.parameters[0], lost_energy=lost)
    told = dataclasses.replace(report, parameters=(record,))
    assert told.metrics()["safedelta/kept_share"] < 0 and told.metrics()["safedelta/moved_share"] > 1
    assert "further than the way back" in told.summary()
    for text in (told.summary(), str(told), told.table(), told.model_card(), told._repr_html_()):
        assert "-2" not in text and "-9" not in text and "112 %" not in text and "316 %" not in text


def test_where_nothing_was_changed_that_is_the_outcome(report):
    still = tuple(dataclasses.replace(record, lost_energy=1e-13) for record in layered(2))
    unmoved = tuple(dataclasses.replace(record, delta_energy=0.0, lost_energy=0.0) for record in still)
    found = {
        "nothing tuned": dataclasses.replace(report, parameters=unmoved),
        "nothing changed": dataclasses.replace(report, parameters=still),
        "nothing to repair": dataclasses.replace(report, parameters=still, search=search("nothing needed")),
        "adjusted": report,
    }
    assert {outcome: one.outcome for outcome, one in found.items()} == {outcome: outcome for outcome in found}
    for outcome, one in found.items():
        assert ("Moved" in one.summary()) == (outcome == "adjusted") and one.to_dict()["outcome"] == outcome
    assert "at strength 0.1 leaves every weight as it was tuned" in found["nothing changed"].summary()
    assert found["nothing to repair"].summary().startswith("Nothing to repair")


@pytest.mark.parametrize("width", [40, 72, 120])
def test_the_overview_fits_the_terminal_and_counts_every_weight(report, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    told = str(dataclasses.replace(report, parameters=layered(32) + report.parameters))
    sentences = " ".join(told.split())
    assert max(map(len, told.splitlines())) <= width
    if width == 120:
        assert len(told.splitlines()) < 40
        assert (
            "model.layers.*.mlp.experts.*.up_proj.weight" in told
            and "96 adjusted" in told
            and "129 weights adjusted" in sentences
        )
        assert "layers 28 to 31" in told and "50 %" in told and "192 -> 96" in told


def test_html_is_escaped_and_closed(report):
    class Closed(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            self.seen.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    record = dataclasses.replace(report.parameters[0], parameter="<script>alert('x')</script>")
    told = dataclasses.replace(report, architecture="<b onclick=x>", parameters=(record, *layered(80)))._repr_html_()
    reader = Closed()
    reader.feed(told)
    assert not reader.open and set(reader.seen) <= {*"b p div table thead tbody tr th td details summary".split()}
    assert "&lt;script&gt;" in told and len(told) < 10_000


def test_a_data_frame_has_a_row_for_each_parameter(report, monkeypatch):
    frame = report.to_pandas()
    assert list(frame["parameter"]) == ["a.weight", "b.weight", "c.weight"]
    assert list(frame["moved_share"]) == [0.5, 1.0, 0.0]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigurationError, match="pip install pandas"):
        report.to_pandas()


def test_the_model_card_gives_the_strength_that_was_applied_and_the_measured_refusals(report):
    rule = RuleRecord(name="task_ridge", settings={"strength": "auto", "mix": 0.1})
    card = dataclasses.replace(report, rule=rule, search=search(), base_model="org/aligned@0123").model_card()
    assert "`task_ridge` at strength 3.2 (`mix=0.1`)" in card and "'auto'" not in card and "org/aligned@0123" in card
    assert "0 of 64 held-out ones lost" in card and "not a measured refusal rate" not in card
    assert math.isclose(dataclasses.replace(report, search=search()).strength, 3.2) and report.strength == 0.1


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
