import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from safedelta_hf.compare import draw
from safedelta_hf.rules import TaskRidge
from tests.compare.points import BEFORE, comparison, point, search


def drawn(file, folder, monkeypatch, described=None):
    """The files, and the panels of each."""
    found, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **how: (found.append(figure), save(figure, *args, **how))
    )
    files = draw(file, folder, described)
    return [path.name for path in files], [figure.axes for figure in found]


def heads(panels):
    """What stands above each row of panels."""
    return list(dict.fromkeys(panel.figure.get_suptitle() for panel in panels))


def legend(panels):
    return [text.get_text() for text in panels[0].figure.figure.legends[0].get_texts()]


def titles(panels):
    return [panel.get_title(loc="left") for panel in panels if panel.axison]


def dots(panel):
    """Where the mean of each row lies, by its label or number, and whether the dot is filled."""
    lines = [line for line in panel.lines if line.get_marker() == "o"]
    return {round(line.get_ydata()[0]): (line.get_xdata()[0], line.get_markerfacecolor() != "white") for line in lines}


def test_each_kind_of_weights_has_a_figure_with_a_panel_for_each_scenario_and_score(tmp_path, monkeypatch):
    other = [point(one.method, 0.5, scenario="benign") for one in BEFORE]
    file = comparison(tmp_path, *BEFORE, *other, point("ridge", 0.3, 0.5, weights="lora", strength=3.0))
    names, (full, lora) = drawn(file, tmp_path, monkeypatch)
    assert names == ["comparison-full.png", "comparison-lora.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    mixed = ["Harmful requests answered", "New skill: right answers", "Old skills: right answers"]
    assert titles(full) == [*mixed, mixed[0], mixed[2]] and titles(lora) == mixed
    assert [text.get_text() for panel in full if not panel.axison for text in panel.texts] == ["no new skill here"]
    assert heads(full) == ["Model: mixed", "Model: benign"]
    assert [panel.get_title(loc="right") for panel in full[:3]] == ["← better", "better →", "better →"]


def test_a_dot_is_the_mean_over_seeds_and_is_filled_where_all_reach_the_goal(tmp_path, monkeypatch):
    seed = {"strength": "auto", "search": search(2.0)}
    again = [point(one.method, one.scores["attack_success"].value, 0.9, seed=1) for one in BEFORE]
    rules = [point("ridge", 0.0, 0.9, 1.0, **seed), point("ridge", 0.2, 0.9, 0.96, seed=1, **seed)]
    _, ((attack, _, old),) = drawn(comparison(tmp_path, *BEFORE, *again, *rules), tmp_path, monkeypatch)
    assert dots(attack)[2] == (pytest.approx(0.1), False) and dots(old)[2] == (pytest.approx(0.98), True)
    assert dots(attack)[0][1] and not dots(attack)[1][1]
    ranges = [line.get_xdata() for line in attack.lines if line.get_linewidth() > 4]
    assert list(ranges[2]) == pytest.approx([0.0, 0.2])


def test_low_attack_success_is_spread_out(tmp_path, monkeypatch):
    _, ((attack, *_),) = drawn(comparison(tmp_path, *BEFORE), tmp_path, monkeypatch)
    place = {
        value: attack.transAxes.inverted().transform(attack.transData.transform((value, 0)))[0] for value in (0, 0.05)
    }
    assert place[0.05] - place[0] > 0.3


def test_attack_success_is_drawn_alone_or_beside_a_cost_and_the_default_is_marked(tmp_path, monkeypatch):
    usual = {**TaskRidge().settings, "ordinary_weight": 0.0, "search": search(2.0)}
    alone = comparison(tmp_path / "a", point("aligned", 0.0, old=None), point("task_ridge", 0.1, old=None, **usual))
    _, ((panel,),) = drawn(alone, tmp_path, monkeypatch)
    assert [text.get_text() for text in panel.get_yticklabels()] == ["before fine-tuning (aligned)", "task_ridge"]
    costly = comparison(
        tmp_path / "b", point("task_ridge", 0.1, **usual), utilities={"old_skills": "cost"}, default=TaskRidge()
    )
    _, ((attack, cost),) = drawn(costly, tmp_path, monkeypatch)
    assert cost.get_title(loc="right") == "← better"
    assert [text.get_text() for text in attack.get_yticklabels()] == ["task_ridge (default)"]


def test_a_figure_says_what_it_shows_and_nothing_of_what_it_does_not(tmp_path, monkeypatch):
    both = point("task_ridge, then polished", 0.0)
    _, (panels,) = drawn(comparison(tmp_path, *BEFORE, both), tmp_path, monkeypatch, {"mixed": "some of each"})
    told = legend(panels)
    assert heads(panels) == ["Fine-tuned on “mixed”: some of each"]
    assert "repaired by such a rule, and trained as well" in told and "trained in another way" not in told
    goal = "goal: at most 2 points more answered than before; 95% of what was gained; 90% of the old skills"
    assert goal in told and not any("seed" in one for one in told)


def test_nothing_overlaps_however_long_the_name_and_few_the_scores(tmp_path, monkeypatch):
    name = "a-very-long-name-of-a-model-" * 5
    alone = [point(one.method, 0.3, old=None, scenario=name) for one in BEFORE]
    _, ((panel,),) = drawn(comparison(tmp_path, *alone), tmp_path, monkeypatch)
    band = panel.figure
    renderer = FigureCanvasAgg(band.figure).get_renderer()
    boxes = [one.get_window_extent(renderer) for one in (band._suptitle, panel.title, panel._left_title)]
    boxes += [band.figure.legends[0].get_window_extent(renderer), panel.xaxis.get_tightbbox(renderer)]
    boxes = [box for box in boxes if box.width]
    assert not any(one.overlaps(other) for one in boxes for other in boxes if one is not other)
    assert all(0 <= box.x0 and box.x1 <= band.figure.bbox.width for box in boxes)
