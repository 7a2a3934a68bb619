import json
import random

import pytest

from safedelta_hf.errors import DataError, OutputError
from safedelta_hf.evaluation import Evaluation, Score
from safedelta_hf.evaluation.result import average, share


def test_share_is_the_mean_with_wilsons_interval():
    found = share([True] * 8 + [False] * 2)
    # Figures of the method's textbook example, 8 of 10.
    assert (found.value, found.count) == (0.8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


@pytest.mark.parametrize("values", [[True], [False] * 200, [True] * 200, [0.3, 0.4]])
def test_intervals_hold_the_share_and_stay_within_0_and_1(values):
    found = share(values)
    assert 0 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


@pytest.mark.parametrize("true", [0.02, 0.5, 0.9])
def test_intervals_cover_the_truth_about_as_often_as_they_say(true):
    rng = random.Random(0)
    found = [share([rng.random() < true for _ in range(80)]) for _ in range(2000)]
    assert 0.93 <= sum(score.low <= true <= score.high for score in found) / len(found) <= 0.98


def test_average_has_the_interval_of_its_standard_error():
    found = average([1.0, 2.0, 3.0, 4.0], "nats/token")
    spread = 1.959964 * (5 / 3) ** 0.5 / 2
    assert (found.value, found.low, found.high) == pytest.approx((2.5, 2.5 - spread, 2.5 + spread))
    assert average([1.0], "nats/token").low is None


@pytest.mark.parametrize("values", [[], [0.5, 1.5], [-0.1], [float("nan")]])
def test_shares_outside_their_range_are_refused(values):
    with pytest.raises(DataError, match="from 0 to 1"):
        share(values)


def evaluation(value=0.25):
    return Evaluation(
        model="m" * 64,
        scores={
            "attack_success": Score(value=value, count=4, low=0.1, high=0.7),
            "refusal_nll_95": Score(value=2.5, count=3, unit="nats/token"),
        },
        prompts={"harmful": "p" * 64},
        settings={"max_new_tokens": 8},
    )


def test_saved_and_loaded_is_the_same(tmp_path):
    evaluation().save(tmp_path / "results.json")
    assert Evaluation.load(tmp_path / "results.json") == evaluation()
    assert json.loads((tmp_path / "results.json").read_text())["scores"]["attack_success"]["value"] == 0.25


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    evaluation().save(tmp_path / "results.json")
    monkeypatch.setattr("safedelta_hf.folders.os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OutputError, match="cannot be written .*full"):
        evaluation(0.5).save(tmp_path / "results.json")
    assert Evaluation.load(tmp_path / "results.json") == evaluation()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"scores": {"a": {"value": 1}}}', '{"scores": {}, "other": 1}'])
def test_other_files_are_no_evaluations(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match="no saved evaluation"):
        Evaluation.load(tmp_path / "results.json")
    with pytest.raises(DataError, match="no saved evaluation"):
        Evaluation.load(tmp_path / "absent.json")


def test_the_table_shows_every_score_with_its_interval_unit_and_count():
    text = str(evaluation())
    assert all(part in text for part in ("attack_success", "25.0%", "10.0% to 70.0%", "2.5", "nats/token", "4", "3"))


def test_metrics_are_values_by_prefixed_name():
    assert evaluation().metrics("safedelta/eval_") == {
        "safedelta/eval_attack_success": 0.25,
        "safedelta/eval_refusal_nll_95": 2.5,
    }
