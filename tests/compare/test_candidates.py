import math

import pytest

from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.compare import Candidate, CandidateModel, Scenario, TunedModel, choose_candidates, compare
from safedelta_hf.compare.candidates import grid
from safedelta_hf.errors import ConfigurationError, NumericalError
from safedelta_hf.evaluation.result import share
from safedelta_hf.model.adjust import adjust_model
from safedelta_hf.rules import RULES, Ridge, SafeDelta, Scale, TaskRidge
from tests.compare.points import comparison
from tests.fixtures import tiny


class TinyScenario(Scenario):
    """Measures how far a model is from its base."""

    name, seed, weights, task, ordinary, tuned, profile, baselines = "tiny", 3, "full", None, None, None, None, ()

    def __init__(self):
        self.base = tiny.llama()
        self.tuned = TunedModel(tiny.perturbed(tiny.llama()))
        self.profile = collect_profile(self.base, tiny.rows(24, seed=1), progress=False)
        self.measured = 0
        self.baselines = [Candidate(method="aligned", settings={}, make=lambda: CandidateModel(self.base, 0.0))]

    def measure(self, model):
        self.measured += 1
        pairs = zip(model.parameters(), self.base.parameters(), strict=True)
        distance = sum((one - other).square().sum().item() for one, other in pairs)
        return {"attack_success": share([1 - math.exp(-distance)])}


@pytest.mark.parametrize("name", RULES)
def test_the_grid_lies_within_the_search_range_from_mild_to_strict(name):
    found, (mild, strict) = grid(RULES[name], 5), RULES[name].search_range
    logs = [math.log(strength) for strength in (mild, *found, strict)]
    steps = [after - before for before, after in zip(logs, logs[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 6, abs=0.02)


def test_every_rule_takes_part_or_is_left_out_with_its_reason():
    candidates = choose_candidates(list(RULES), ["auto"], [0.0], has_task=False)
    assert {rule.name for rule in candidates.rules} | set(candidates.left_out) == set(RULES)
    assert "no task data" in candidates.left_out["task_ridge"]
    assert "task_ridge" not in choose_candidates(list(RULES), ["auto"], [0.0], has_task=True).left_out


def test_a_rule_that_needs_more_than_one_tuned_model_is_left_out(monkeypatch):
    class Needy(Ridge):
        name = "needy"

        def __post_init__(self):
            raise ConfigurationError("Needy: others=(); it needs at least one more model")

    monkeypatch.setitem(RULES, "needy", Needy)
    candidates = choose_candidates(["needy", "scale"], [1.0], [0.0], has_task=True)
    assert candidates.left_out == {"needy": "Needy: others=(); it needs at least one more model"}
    assert candidates.rules == (Scale(strength=1.0),)
    with pytest.raises(ConfigurationError, match="no rule can take part .needy: Needy"):
        choose_candidates(["needy"], [1.0], [0.0], has_task=True)


def test_the_default_is_the_measured_strength_and_the_published_one_and_a_grid_on_request():
    assert choose_candidates(["task_ridge"], None, [0.0], has_task=True).rules == (TaskRidge(),)
    both = (SafeDelta(strength="auto"), SafeDelta())
    assert choose_candidates(["safe_delta"], None, [0.0], has_task=True).rules == both
    more = choose_candidates(["task_ridge"], [1.0], [0.0], has_task=True, steps=3).rules
    assert more == tuple(TaskRidge(strength=strength) for strength in (1.0, *grid(TaskRidge, 3)))


def test_what_needs_whole_weights_takes_no_part_with_an_adapter_and_the_file_says_so(tmp_path):
    class Adapted(TinyScenario):
        weights = "lora"

    scenario, candidates = Adapted(), choose_candidates(list(RULES), ["auto"], [0.0], has_task=True)
    able = {rule.name for rule in candidates.rules if not rule.needs_dense}
    assert {one.method for one in candidates.on(scenario)} == able and able < {rule.name for rule in candidates.rules}
    compare([scenario], choose_candidates(["ties"], [1.0], [0.0], has_task=True), file := comparison(tmp_path))
    assert [one.method for one in file.points] == ["aligned"]
    assert "merge the adapter" in file.left_out["ties (a LoRA)"]


def test_retention_is_compared_where_moments_are_read():
    candidates = choose_candidates(["ridge", "scale"], [1.0], [0.0, 0.5], has_task=False)
    settings = [(one.method, one.settings["ordinary_weight"]) for one in candidates.on(TinyScenario())]
    assert settings == [("ridge", 0.0), ("ridge", 0.5), ("scale", 0.0)]


def test_every_rule_starts_from_the_fine_tuned_weights_whatever_came_before(tmp_path):
    scenario = TinyScenario()
    candidates = choose_candidates(["scale", "ridge"], [1e6, 0.5], [0.0], has_task=False)
    compare([scenario], candidates, comparison(tmp_path), progress=False)
    last = scenario.tuned.restored()
    assert tiny.same(tiny.weights(last), tiny.weights(tiny.perturbed(tiny.llama())))
    points = {(one.method, one.settings.get("strength")): one for one in comparison(tmp_path).points}
    for name, strength in (("scale", 0.5), ("ridge", 1e6), ("ridge", 0.5)):
        alone = tiny.perturbed(tiny.llama())
        rule = RULES[name](strength=strength)
        adjust_model(alone, base=scenario.base, profile=scenario.profile, rule=rule, progress=False)
        assert points[name, strength].scores == scenario.measure(alone)


def test_points_that_are_there_are_not_made_again(tmp_path):
    first, again = TinyScenario(), TinyScenario()
    compare([first], choose_candidates(["scale"], [1.0], [0.0], has_task=False), comparison(tmp_path), progress=False)
    compare(
        [again], choose_candidates(["scale"], [1.0, 2.0], [0.0], has_task=False), comparison(tmp_path), progress=False
    )
    assert (first.measured, again.measured) == (2, 1)
    assert len(comparison(tmp_path).points) == 3


def test_a_candidate_that_cannot_be_computed_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    def factorise(rule, moments):
        raise NumericalError("not positive definite")

    candidates = choose_candidates(["ridge", "scale"], [1.0], [0.0], has_task=False)
    with monkeypatch.context() as patch:
        patch.setattr(Ridge, "factorise", factorise)
        file = comparison(tmp_path)
        compare([TinyScenario()], candidates, file, progress=False)
    assert [point.method for point in file.points] == ["aligned", "scale"]
    ((name, reason),) = file.left_out.items()
    assert name.startswith("tiny full 3 ridge") and "not positive definite" in reason
    compare([TinyScenario()], candidates, again := comparison(tmp_path), progress=False)
    assert [point.method for point in again.points] == ["aligned", "scale", "ridge"] and not again.left_out
