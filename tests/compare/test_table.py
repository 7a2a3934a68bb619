from safedelta_hf.compare import markdown
from safedelta_hf.rules import TaskRidge
from tests.compare.points import BEFORE, comparison, point, search


def rows(text, first):
    found = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")][1:] for line in found]


def tables(text):
    """Lines of each table, which is a run of lines that begin with a bar."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [lines for lines in blocks if lines[0].startswith("|")]


def test_a_base_that_does_not_refuse_sets_no_goal_for_attacks_and_the_table_says_so(tmp_path):
    found = point("ridge", 1.0, 0.9, strength="auto", search=search(2.0))
    text = markdown(comparison(tmp_path, point("aligned", 1.0, 0.1), point("fine-tuned", 1.0, 0.9), found))
    assert "**mixed: the base itself does not refuse (attack success 100%)" in text
    assert rows(text, "ridge") == [["100.0%", "90.0% ✓", "100.0% ✓", "2", "1.5"]]
    assert "does not refuse" not in markdown(comparison(tmp_path / "other", *BEFORE, found))


def test_seeds_are_one_row_with_their_mean_their_range_and_a_mark_for_each_goal(tmp_path):
    others = (point("aligned", 0.02, 0.1, 1.0, seed=1), point("fine-tuned", 1.0, 0.9, 0.4, seed=1))
    rules = (
        point("ridge", 0.0, 0.88, 1.0, strength="auto", search=search(2.0)),
        point("ridge", 0.5, 0.9, 0.85, strength="auto", search=search(100.0, "strictest fails", 9), seed=1),
    )
    text = markdown(comparison(tmp_path, *BEFORE, *others, *rules))
    assert rows(text, "ridge") == [
        ["25.0% (0.0 to 50.0) (✓)", "89.0% (88.0 to 90.0) ✓", "92.5% (85.0 to 100.0) (✓)", "2 / 100!", "1.5"]
    ]
    assert rows(text, "fine-tuned")[0][:3] == ["100.0% ✗", "90.0% ✓", "40.0% ✗"]


def test_several_scenarios_have_an_overview_by_marks_alone(tmp_path):
    settings = {**TaskRidge().settings, "ordinary_weight": 0.0}
    benign = (point("aligned", 0.0, scenario="benign"), point("fine-tuned", 1.0, old=0.99, scenario="benign"))
    default = point("task_ridge", 0.0, 0.9, 0.6, search=search(2.0), **settings)
    text = markdown(comparison(tmp_path, *BEFORE, *benign, default, default=TaskRidge()))
    assert "Goals, in this order: attack success, new skill, old skills." in text
    assert rows(text, "method")[0] == ["mixed", "benign"]
    assert rows(text, "fine-tuned")[0] == ["✗ ✓ ✗", "✗ · ✓"]
    assert rows(text, r"**task_ridge** (default)")[0] == ["✓ ✓ ✗", ""]
    assert "Goals" not in markdown(comparison(tmp_path / "one", *BEFORE))


def test_every_table_has_a_rule_and_as_many_cells_in_each_line(tmp_path):
    lora = [point(one.method, 0.5, 0.2, weights="lora") for one in BEFORE]
    other = [point(one.method, 0.5, scenario="benign") for one in BEFORE]
    file = comparison(tmp_path, *BEFORE, *lora, *other, point("ridge", 0.3, strength=3.0, ordinary_weight=0.1))
    file.left_out = {"ties": "it needs more models"}
    text = markdown(file)
    found = tables(text)
    assert len(found) == 4 and "* `ties` left out: it needs more models" in text
    assert "safedelta compare --seed 0" in text and "## Fine-tuned: a LoRA" in text
    for lines in found:
        assert len({line.count("|") for line in lines}) == 1 and set(lines[1]) <= set("|-: ")
    assert rows(text, "ridge, strength 3, ordinary weight 0.1")
