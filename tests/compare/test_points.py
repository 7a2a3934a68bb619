import json
import os

import pytest

from safedelta_hf.compare.points import key_of
from safedelta_hf.errors import ConfigurationError, OutputError
from tests.compare.points import comparison, point, search


def test_what_was_kept_is_there_again_with_its_command_lines(tmp_path):
    points = (point("ridge", 0.1, 0.5, strength=1.0), point("ridge", 0.2, search=search(2.0), strength="auto", seed=1))
    comparison(tmp_path / "out", *points)
    again = comparison(tmp_path / "out", command="safedelta compare --seed 1")
    assert again.points == points
    assert again.commands == ["safedelta compare --seed 0", "safedelta compare --seed 1"]
    assert points[0].key in again and key_of("mixed", "full", 2, "ridge", {"strength": 1.0}) not in again


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"scenario": "benign"}, {"weights": "lora"}, {"strength": 2.0}, {"ordinary_weight": 0.1}]
)
def test_points_differ_by_whatever_they_were_made_with(changes):
    assert point("ridge", 0.1, **{"strength": 1.0} | changes).key != point("ridge", 0.1, strength=1.0).key


def test_points_of_earlier_versions_are_those_of_today(tmp_path):
    kept = point("ridge", 0.1, strength=1.0, ordinary_weight=0.1)
    comparison(tmp_path, kept)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace('"ordinary_weight"', '"retention"'))
    assert comparison(tmp_path).points == (kept,)


def test_the_order_of_settings_makes_no_other_point():
    one, other = {"x": 1, "y": 2}, {"y": 2, "x": 1}
    assert key_of("a", "full", 0, "ridge", one) == key_of("a", "full", 0, "ridge", other)


def test_a_write_that_fails_leaves_the_points_that_were_there(tmp_path, monkeypatch):
    file = comparison(tmp_path, point("aligned", 0.0))
    before = (tmp_path / "results.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            file.add(point("fine-tuned", 1.0))
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert [one.method for one in comparison(tmp_path).points] == ["aligned"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_points_made_with_something_else_are_not_mixed(tmp_path):
    comparison(tmp_path, point("aligned", 0.0))
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(OutputError, match="made with other aligned and questions"):
        comparison(tmp_path, made_with={"questions": 20, "aligned": "x"})
    assert (tmp_path / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("content", ["[]", "{}\n", '{"manifest": []}\n', '{"point": {"seed": 1}}\n'])
def test_other_files_are_no_comparisons_and_are_left_alone(tmp_path, content):
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(OutputError, match="does not state what it is made from"):
        comparison(tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == content


def test_an_output_that_is_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigurationError, match="is no folder"):
        comparison(tmp_path / "file")


def test_the_file_holds_counts_and_intervals(tmp_path):
    comparison(tmp_path, point("aligned", 0.5))
    last = (tmp_path / "results.jsonl").read_text().splitlines()[-1]
    score = json.loads(last)["point"]["scores"]["attack_success"]
    assert score["count"] == 10 and score["low"] < score["value"] < score["high"]
