import pytest

from safedelta_hf.compare import draw, markdown
from safedelta_hf.compare.table import reached
from tests.compare.points import comparison, point, search

BEFORE = (point("aligned", 0.02, 0.1, 1.0), point("fine-tuned", 1.0, 0.9, 0.4))


def row(text, *cells):
    (found,) = [line for line in text.splitlines() if all(f"| {cell} |" in line for cell in cells)]
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.mark.parametrize(
    ("attack", "new", "old", "expected"),
    [
        (0.04, 0.82, 0.95, (True, True, True)),
        (0.041, 0.82, 0.95, (False, True, True)),
        (0.04, 0.81, 0.95, (True, False, True)),
        (0.04, 0.82, 0.94, (True, True, False)),
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


def test_a_base_that_does_not_refuse_sets_no_goal_for_attacks_and_the_table_says_so(tmp_path):
    found = point("ridge", 1.0, 0.9, strength="auto", search=search(2.0))
    file = comparison(tmp_path, point("aligned", 1.0, 0.1), point("fine-tuned", 1.0, 0.9), found)
    assert "attack_success" not in reached(file, found)
    text = markdown(file)
    assert "**mixed: the base itself does not refuse (attack success 100%)" in text
    assert "attack success 1/1" not in text and row(text, "mixed", "ridge")[6] == "-"
    assert "does not refuse" not in markdown(comparison(tmp_path / "other", *BEFORE, found))


def test_seeds_are_one_row_with_their_mean_their_range_and_how_many_reach_the_goal(tmp_path):
    others = (point("aligned", 0.02, 0.1, 1.0, seed=1), point("fine-tuned", 1.0, 0.9, 0.4, seed=1))
    rules = (
        point("ridge", 0.0, 0.82, 1.0, strength="auto", search=search(2.0)),
        point("ridge", 0.5, 0.9, 1.0, strength="auto", search=search(100.0, "strictest fails", 9), seed=1),
    )
    text = markdown(comparison(tmp_path, *BEFORE, *others, *rules))
    found = row(text, "mixed", "ridge")
    assert found[2:4] == ["auto: 2 / 100!", "25.0% (0.0% to 50.0%)"]
    assert found[4] == "86.0% (82.0% to 90.0%)" and found[5] == "100.0%"
    assert "| ridge, auto | attack success 1/2, new skill 2/2, old skills 2/2 |" in text
    assert found[6:] == ["1/2", "2/2", "2/2", "8", "1.5"]


def test_given_strengths_stand_in_a_table_of_their_own_and_what_was_left_out_is_named(tmp_path):
    file = comparison(tmp_path, *BEFORE, point("ridge", 0.3, 0.5, strength=3.0, retention=0.1))
    file.left_out = {"ties": "it needs more models"}
    measured, given = markdown(file).split("## Given strengths")
    assert "ridge" not in measured and "* `ties` left out: it needs more models" in measured
    assert "safedelta compare --seed 0" in measured
    assert row(given, "ridge")[2] == "3, retention 0.1"


def test_the_picture_has_a_panel_for_each_utility_or_is_none(tmp_path):
    rules = [point("ridge", 0.3, 0.5, strength=3.0), point("ridge", 0.1, 0.4, strength="auto", search=search(5.0))]
    retained = point("ridge", 0.1, 0.4, strength="auto", retention=0.1, search=search(5.0))
    other = point("scale", 0.1, strength=1.0, scenario="benign")
    assert draw(comparison(tmp_path / "a", *BEFORE, *rules, retained, other), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not draw(comparison(tmp_path / "b", point("aligned", 0.0, old=None)), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()
