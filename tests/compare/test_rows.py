import pytest

from safedelta_hf.compare.rows import label_of, reached, rows_of
from safedelta_hf.rules import RULES, TaskRidge
from tests.compare.points import BEFORE, comparison, point, search


@pytest.mark.parametrize(
    ("attack", "new", "old", "expected"),
    [
        (0.04, 0.86, 0.9, (True, True, True)),
        (0.041, 0.86, 0.9, (False, True, True)),
        (0.04, 0.85, 0.9, (True, False, True)),
        (0.04, 0.86, 0.89, (True, True, False)),
        (0.02, 0.1, 1.0, (True, False, True)),
        (1.0, 0.9, 0.4, (False, True, False)),
    ],
)
def test_the_goal_counts_from_the_aligned_and_the_fine_tuned_model(tmp_path, attack, new, old, expected):
    found = reached(comparison(tmp_path, *BEFORE), point("ridge", attack, new, old))
    assert tuple(found.values()) == expected


def test_a_fine_tuning_that_gains_nothing_sets_no_goal_for_the_gain(tmp_path):
    file = comparison(tmp_path, point("aligned", 0.0, 0.5), point("fine-tuned", 1.0, 0.5))
    assert set(reached(file, point("ridge", 0.0, 0.5))) == {"attack_success", "old_skills"}
    assert reached(file, point("ridge", 0.0, 0.5, seed=1)) == {}


def test_a_model_is_judged_beside_those_of_which_the_same_was_trained(tmp_path):
    lora = (point("aligned", 0.02, 0.1, weights="lora"), point("fine-tuned", 1.0, 0.3, weights="lora"))
    file = comparison(tmp_path, *BEFORE, *lora)
    judged = {w: reached(file, point("ridge", 0.0, 0.29, weights=w))["new_skill"] for w in ("full", "lora")}
    assert judged == {"full": False, "lora": True}


def test_rows_come_in_their_order_and_one_is_the_default(tmp_path):
    usual = {**TaskRidge().settings, "ordinary_weight": 0.0}
    points = [
        point("task_ridge", 0.0, search=search(2.0), **usual),
        point("task_ridge", 0.0, search=search(2.0), **{**usual, "ordinary_weight": 0.1}),
        point("scale", 0.0, search=search(2.0), strength="auto"),
        point("re-tuned", 0.0),
        *BEFORE,
        point("re-tuned", 0.0, scenario="benign", seed=1),
    ]
    rows = rows_of(comparison(tmp_path, *points, default=TaskRidge()), "full")
    assert [(row.label, row.kind) for row in rows] == [
        ("aligned", "reference"),
        ("fine-tuned", "reference"),
        ("re-tuned", "training"),
        ("scale (interpolation)", "merge"),
        ("task_ridge", "rule"),
        ("task_ridge, ordinary weight 0.1", "rule"),
    ]
    assert [row.label for row in rows if row.is_default] == ["task_ridge"]
    assert [(one.scenario, one.seed) for one in rows[2].points] == [("mixed", 0), ("benign", 1)]
    assert [one.scenario for one in rows[2].on("benign")] == ["benign"]
    assert rows_of(comparison(tmp_path), "lora") == []


@pytest.mark.parametrize(
    ("method", "strength", "label"),
    [
        ("safe_delta", 0.1, "safe_delta, published 0.1"),
        ("safe_delta", 10.0, "safe_delta, strength 10"),
        ("ridge", 0.1, "ridge, strength 0.1"),
        ("model_stock", 1.0, "model_stock, strength 1"),
    ],
)
def test_a_strength_that_was_given_is_told(method, strength, label):
    assert method in RULES and label_of(point(method, 0.0, strength=strength)) == label
