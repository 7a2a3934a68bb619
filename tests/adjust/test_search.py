"""The search for a strength, against losses that are known functions of it."""

import math
import random
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.adjust.search import search_strength, strengths_of
from safedelta_hf.core.binomial import upper_bound
from safedelta_hf.data.refusals import Drift
from safedelta_hf.errors import FactorisationError, SafeDeltaWarning
from safedelta_hf.rules import AutoStrength, Ridge, SafeDelta, Scale, TaskRidge

AUTO = AutoStrength()
EXAMPLES = Path(__file__).parents[2] / "examples"
RULES = [Ridge(), TaskRidge(), Scale(), SafeDelta(strength="auto")]
REFUSALS = 100  # of which one may be lost


def losing(lost, probability_lost=0.0, standard_error=0.0):
    return lambda strength: Drift(lost=lost, probability_lost=probability_lost, standard_error=standard_error)


def returning(rule, thresholds):
    """Each refusal returns at a threshold of its own, milder on the side of the rule's mildest strength."""
    keeps_less = rule.mildest == 0

    def measure(strength):
        lost = sum(strength < one if keeps_less else strength > one for one in thresholds)
        return Drift(lost=lost, probability_lost=0.0)

    return measure


def in_sequence(rule, auto, measure, allowed):
    """Oracle: the fixed sequence of tests, one strength after another from the strictest on."""
    chosen = None
    for strength in [*strengths_of(rule, auto.precision), rule.mildest]:
        drift = measure(strength)
        if drift.lost > allowed or not drift.probability_lost_at_most(auto.confidence) <= auto.share:
            break
        chosen = strength
    return chosen


@given(st.sampled_from(RULES), st.lists(st.floats(-3.5, 4.5), min_size=1, max_size=40))
def test_the_search_ends_where_the_fixed_sequence_of_tests_ends(rule, exponents):
    thresholds = [10.0**exponent for exponent in exponents]
    measure = returning(rule, thresholds)
    found = search_strength(rule, AUTO, measure, REFUSALS)
    expected = in_sequence(rule, AUTO, measure, allowed=1)
    if expected is None:
        assert found.outcome == "strictest fails" and found.strength == pytest.approx(rule.search_range[1])
    else:
        assert found.strength == expected
        assert found.outcome == ("nothing needed" if expected == rule.mildest else "found")
    assert found.applied.passed == (found.outcome != "strictest fails")
    assert len({trial.strength for trial in found.trials}) == len(found.trials), "none is measured twice"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("precision", [1.2, 1.5, 3.0])
def test_neighbouring_strengths_are_as_close_as_was_asked_and_span_the_range(rule, precision):
    found = strengths_of(rule, precision)
    assert (found[0], found[-1]) == pytest.approx(rule.search_range[::-1])
    ratios = [abs(math.log(one / other)) for one, other in zip(found, found[1:], strict=False)]
    assert max(ratios) == pytest.approx(min(ratios)) and max(ratios) <= math.log(precision) * (1 + 1e-9)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_model_that_still_refuses_is_left_alone(rule):
    found = search_strength(rule, AUTO, losing(1), REFUSALS)
    assert (found.outcome, found.strength, len(found.trials)) == ("nothing needed", rule.mildest, 1)
    assert "at its mildest" in found.summary


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_strictest_strength_that_fails_is_said(rule):
    found = search_strength(rule, AUTO, losing(2), REFUSALS)
    assert found.outcome == "strictest fails" and "not enough" in found.summary
    assert found.strength == pytest.approx(rule.search_range[1])
    assert found.bound == upper_bound(2, REFUSALS, 0.95) and not found.holds


@pytest.mark.parametrize(
    ("mean", "standard_error"), [(0.051, 0.0), (0.04, 0.0061), (math.nan, 0.0), (0.0, math.nan), (math.nan, math.nan)]
)
def test_what_sampling_loses_counts_too_and_no_number_never_passes(mean, standard_error):
    found = search_strength(Ridge(), AUTO, losing(0, mean, standard_error), REFUSALS)
    assert found.outcome == "strictest fails"


@pytest.mark.parametrize(("confidence", "deviations"), [(0.5, 0.0), (0.2, 0.0), (0.95, 1.6448536), (0.99, 2.3263479)])
def test_what_sampling_loses_is_within_the_share_with_the_confidence(confidence, deviations):
    auto = AutoStrength(lost=0.4, confidence=confidence)
    for spare, passes in ((1e-6, True), (-1e-6, False)):
        mean = 0.4 - deviations * 0.02 - spare
        found = search_strength(Ridge(), auto, losing(0, mean, 0.02), REFUSALS)
        assert found.trials[0].passed == passes
        assert found.trials[0].probability_lost_bound == pytest.approx(mean + deviations * 0.02, abs=1e-7)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("threshold", [0.4, 9.0, 37.0, 300.0])
def test_a_search_takes_few_evaluations(rule, threshold):
    found = search_strength(rule, AUTO, returning(rule, [threshold] * 2), REFUSALS)
    assert len(found.trials) <= 8
    assert all(trial.strength == rule.mildest or trial.strength > 0 for trial in found.trials)


def test_where_losses_are_seen_to_fall_the_sequence_is_walked():
    grid = strengths_of(Ridge(), AUTO.precision)
    failing = grid.index(min(grid, key=lambda one: abs(math.log(one / 1.3))))  # between two that are tried

    def measure(strength):
        place = grid.index(strength) if strength else len(grid)
        if place == failing:
            return Drift(lost=2, probability_lost=0.0)
        # One is lost at a strict strength, none at a milder one: losses fall as it gets milder.
        lost = 1 if place < failing else 0 if strength > 0.3 else 9
        return Drift(lost=lost, probability_lost=0.0)

    assert measure(grid[failing - 1]).lost == 1 and measure(grid[failing + 1]).lost == 0
    found = search_strength(Ridge(), AUTO, measure, REFUSALS)
    assert found.strength == in_sequence(Ridge(), AUTO, measure, allowed=1) == grid[failing - 1]


@pytest.mark.parametrize(
    ("refusals", "lost", "confidence", "allowed"),
    [
        (30, None, 0.95, 0),
        (59, None, 0.95, 0),
        (93, None, 0.95, 1),
        (93, 0.1, 0.95, 4),
        (93, 0.1, 0.5, 8),
        (0, None, 0.95, 0),
    ],
)
def test_as_many_may_be_lost_as_the_bound_allows(refusals, lost, confidence, allowed):
    auto = AutoStrength(lost=lost, confidence=confidence)
    for count, passes in ((allowed, True), (allowed + 1, False)):
        found = search_strength(Ridge(), auto, losing(count), refusals)
        assert found.trials[0].passed == passes and found.allowed == allowed


def test_what_is_certain_and_what_would_make_it_more_is_said():
    few = search_strength(Ridge(), AUTO, losing(0), 25)
    assert few.bound == upper_bound(0, 25, 0.95) == pytest.approx(0.113, abs=1e-3)
    assert few.more == 59 - 25 and few.holds and few.warning == ""
    assert "at most 11.3 % of refusals like these are lost. 34 more held out" in few.summary
    enough = search_strength(Ridge(), AUTO, losing(0), 60)
    assert enough.bound <= 0.05 and enough.more == 0 and "more held out" not in enough.summary
    # What was tested is that no more than the share is lost; a smaller count does not show more.
    assert search_strength(Ridge(), AUTO, losing(0), 93).bound == upper_bound(1, 93, 0.95)


@pytest.mark.parametrize(("auto", "refusals"), [(AutoStrength(lost=0.05), 40), (AutoStrength(), 0)])
def test_less_than_was_asked_for_is_a_warning(auto, refusals):
    found = search_strength(Ridge(), auto, losing(0), refusals, others=60 - refusals)
    assert not found.holds and found.warning.startswith("LESS IS CERTAIN")
    assert f"{60 - refusals} held-out refusals the base itself does not begin" in found.warning
    assert ("no held-out one could be counted" in found.summary) == (not refusals)
    assert ("Nothing is certain of the refusals." in found.promise) == (not refusals)


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("refusals", [59, 150])
def test_the_bound_holds_as_often_as_it_claims(noise, refusals):
    population = runpy.run_path(str(EXAMPLES / "benchmarks" / "refusal_bounds.py"))["population"]
    rng, missed, runs = random.Random(0), 0, 300
    for _ in range(runs):
        share, drawn = population(rng, noise)
        found = search_strength(TaskRidge(), AUTO, drawn(refusals), refusals)
        missed += found.outcome == "found" and share(found.strength) > found.bound
    # Five in a hundred, and three standard errors of so many runs.
    assert missed / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def solvable_up_to(limit, measure):
    """Losses that cannot be measured beyond a strength, since the moments cannot be factored there."""

    def measured(strength):
        if strength > limit:
            raise FactorisationError("not positive definite")
        return measure(strength)

    return measured


@pytest.mark.parametrize("limit", [0.003, 0.5, 2.0, 5e4])
def test_what_cannot_be_factored_is_the_end_of_the_range(limit):
    with pytest.warns(SafeDeltaWarning, match="stays milder than strength .*not positive definite"):
        found = search_strength(Ridge(), AUTO, solvable_up_to(limit, losing(2)), REFUSALS)
    assert found.outcome == "strictest fails"
    assert limit / AUTO.precision <= found.strength <= limit
    strengths = [trial.strength for trial in found.trials]
    assert max(strengths) == found.strength and len(set(strengths)) == len(strengths)


@pytest.mark.parametrize("limit", [0.003, 0.5])
def test_a_search_that_begins_beyond_the_range_finds_what_is_within(limit):
    with pytest.warns(SafeDeltaWarning, match="stays milder"):
        found = search_strength(Ridge(), AUTO, solvable_up_to(limit, returning(Ridge(), [0.0005] * 2)), REFUSALS)
    assert found.outcome == "found" and 1 <= found.strength / 0.0005 <= AUTO.precision * (1 + 1e-9)


def test_moments_that_no_strength_can_factor_are_a_named_error():
    with pytest.warns(SafeDeltaWarning), pytest.raises(FactorisationError, match="at any strength that a search tries"):
        search_strength(Ridge(), AUTO, solvable_up_to(0.0, losing(2)), REFUSALS)
