import json

import pytest

from safedelta_hf.errors import ConfigurationError, DataError, SafeDeltaError
from safedelta_hf.evaluation.board import Board
from tests.evaluation.board.results import evaluation, saved

YES_NO = {"attack_success": [1, 0, 1, 0]}


def read(folder, subject=None, **found):
    return Board.read({name: saved(folder / name, one) for name, one in found.items()}, subject)


def test_each_is_compared_with_the_first_and_the_judged_one_with_all(tmp_path):
    found = read(tmp_path, **{name: evaluation(name, **YES_NO) for name in ("a", "b", "c", "d")})
    assert [(one.name, one.against) for one in found.differences] == [
        ("b", "a"),
        ("c", "a"),
        ("d", "a"),
        ("d", "b"),
        ("d", "c"),
    ]
    assert found.subject.name == "d" and found.notes == ()


def test_scores_that_one_alone_has_are_shown_and_not_compared(tmp_path):
    more = evaluation("b", task_accuracy=[1, 1], **YES_NO)
    found = read(tmp_path, a=evaluation("a", **YES_NO), b=more)
    assert found.scores == ("attack_success", "task_accuracy")
    assert [one.score for one in found.differences] == ["attack_success"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"harmful": "others"}}, "asked other harmful prompts"),
        ({"settings": {"max_new_tokens": 9}}, "another --max-new-tokens .8 and 9."),
        ({"settings": {"reference": "r"}}, "another --base .None and r."),
        ({"settings": {"coherence_limit": 2.0}}, "another --coherence-limit"),
        ({"settings": {"decoding": "beams"}}, "another decoding"),
        ({"settings": {"judge": "j"}, "attack_success_by_judge": [0, 0, 1, 1]}, "another --judge"),
        ({"attack_success": [1, 0, 1]}, "attack_success is of 4 and of 3 examples"),
    ],
)
def test_what_was_measured_otherwise_is_refused_by_name(tmp_path, changes, message):
    first = evaluation("a", attack_success_by_judge=[0, 0, 1, 1], **YES_NO)
    second = evaluation("b", **{**YES_NO, **changes})
    with pytest.raises(DataError, match=f"first and second cannot be compared: .*{message}"):
        read(tmp_path, first=first, second=second)


@pytest.mark.parametrize(
    "changes", [{"settings": {"batch_size": 1}}, {"settings": {"judge": "j"}}, {"settings": {"score": "s"}}]
)
def test_settings_that_no_shared_score_depends_on_may_differ(tmp_path, changes):
    assert read(tmp_path, a=evaluation("a", **YES_NO), b=evaluation("b", **YES_NO, **changes)).differences


def test_results_of_older_versions_are_compared_without_a_test_and_that_is_said(tmp_path):
    first, second = (saved(tmp_path / name, evaluation(name, **YES_NO)) / "results.json" for name in ("a", "b"))
    content = json.loads(first.read_text())
    del content["values"]
    first.write_text(json.dumps(content))
    found = Board.read({"old": first, "new": second})
    assert found.differences[0].p_value is None and found.differences[0].value == 0
    assert "old: no values prompt by prompt" in found.notes[0]


def test_one_model_under_two_names_is_said(tmp_path):
    assert "a and b are the same model" in read(tmp_path, a=evaluation(**YES_NO), b=evaluation(**YES_NO)).notes[0]


@pytest.mark.parametrize(
    ("names", "subject", "message"),
    [
        (["a"], None, "at least two"),
        (["a", "my-model"], None, "'my-model' is no name"),
        (["a", "attack_success"], None, "means something else"),
        (["a", "upper"], None, "means something else"),
        (["a", "lambda"], None, "means something else"),
        (["a", "b"], "c", "no result is called 'c'; there are a and b"),
    ],
)
def test_names_that_a_gate_could_not_spell_are_refused(tmp_path, names, subject, message):
    with pytest.raises(ConfigurationError, match=message):
        read(tmp_path, subject, **{name: evaluation(name, **YES_NO) for name in names})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("scores", "attack_success", "value"), float("nan")),
        (("values", "attack_success", 0), "x"),
        (("settings",), []),
        (("prompts",), None),
    ],
)
def test_what_is_no_figure_is_refused(tmp_path, place, value):
    folders = [saved(tmp_path / name, evaluation(name, **YES_NO)) for name in ("a", "b")]
    content = json.loads((folders[1] / "results.json").read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folders[1] / "results.json").write_text(json.dumps(content))
    with pytest.raises(SafeDeltaError, match="finite number|no saved evaluation"):
        Board.read({"a": folders[0], "b": folders[1]})


def test_responses_of_another_run_are_not_shown(tmp_path):
    own, other = evaluation("own", **YES_NO), evaluation("other", **YES_NO)
    folder = saved(tmp_path / "a", own, harmful=["w", "x", "y", "z"])
    (folder / "responses-harmful.jsonl").open("a").write('{"index": 9, "prom')
    found = Board.read({"a": folder, "b": saved(tmp_path / "b", other)})
    assert found["a"].responses("harmful")[3] == ("ask 3", "z") and len(found["a"].responses("harmful")) == 4
    other.save(folder / "results.json")
    assert Board.read({"a": folder, "b": tmp_path / "b"})["a"].responses("harmful") == {}
    assert found["b"].responses("harmful") == {}
