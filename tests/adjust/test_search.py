"""The search for a strength, against drifts that are known functions of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.adjust.search import search_strength
from safedelta_hf.data.refusals import Drift
from safedelta_hf.errors import FactorisationError, SafeDeltaWarning
from safedelta_hf.rules import AutoStrength, Ridge, SafeDelta, Scale, TaskRidge

AUTO = AutoStrength(tolerance=0.05, precision=1.2)
RULES = [Ridge(), TaskRidge(), Scale(), SafeDelta(strength="auto")]


def rising(rule, threshold):
    """Refusals return exactly at a threshold, milder on the side of the rule's mildest strength."""
    keeps_less = rule.mildest == 0

    def measure(strength):
        ratio = strength / threshold if keeps_less else threshold / max(strength, 1e-300)
        rise = 0.05 / ratio if ratio > 0 else math.inf
        return Drift(mean=rise / 2, upper=rise)

    return measure


@given(st.sampled_from(RULES), st.floats(-2.5, 3.5))
def test_the_mildest_strength_that_passes_is_found_within_the_precision(rule, exponent):
    threshold = 10.0**exponent
    low, high = sorted(rule.search_range)
    found = search_strength(rule, AUTO, rising(rule, threshold), 7)
    if found.outcome == "found" and low * 10 <= threshold <= high / 10:
        excess = found.strength / threshold if rule.mildest == 0 else threshold / found.strength
        assert 1 - 1e-9 <= excess <= AUTO.precision * (1 + 1e-9)
    last = [trial for trial in found.trials if trial.strength == found.strength][-1]
    assert last.passed == (found.outcome != "strictest fails")
    assert found.examples == 7 and found.tolerance == AUTO.tolerance


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_model_that_still_refuses_is_left_alone(rule):
    found = search_strength(rule, AUTO, lambda strength: Drift(mean=0.01, upper=0.02), 3)
    assert (found.outcome, found.strength, len(found.trials)) == ("nothing needed", rule.mildest, 1)
    assert "at its mildest" in found.summary


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_strictest_strength_that_fails_is_said(rule):
    found = search_strength(rule, AUTO, lambda strength: Drift(mean=1.0, upper=2.0), 3)
    assert found.outcome == "strictest fails" and "not enough" in found.summary
    assert found.strength == pytest.approx(rule.search_range[1])


def test_the_mean_and_the_quantile_both_count():
    mean_fails = search_strength(Ridge(), AUTO, lambda s: Drift(mean=0.06, upper=0.04), 3)
    upper_fails = search_strength(Ridge(), AUTO, lambda s: Drift(mean=0.04, upper=0.06), 3)
    assert mean_fails.outcome == upper_fails.outcome == "strictest fails"


def test_a_drift_that_is_no_number_never_passes():
    found = search_strength(Ridge(), AUTO, lambda s: Drift(mean=math.nan, upper=math.nan), 3)
    assert found.outcome == "strictest fails"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_strength_is_measured_twice_and_few_are(rule):
    found = search_strength(rule, AutoStrength(tolerance=0.05), rising(rule, 37.0), 3)
    strengths = [trial.strength for trial in found.trials]
    assert len(set(strengths)) == len(strengths) <= 9
    assert all(strength == rule.mildest or strength > 0 for strength in strengths)


def test_a_result_was_itself_measured_even_if_the_drift_is_not_monotone():
    bumpy = lambda s: Drift(mean=0.0, upper=0.2 if s < 3 or 30 < s < 50 else 0.01)  # noqa: E731
    found = search_strength(Ridge(), AUTO, bumpy, 3)
    assert found.outcome == "found" and bumpy(found.strength).upper <= AUTO.tolerance


def solvable_up_to(limit, measure):
    """A drift that cannot be measured beyond a strength, since the moments cannot be factored there."""

    def measured(strength):
        if strength > limit:
            raise FactorisationError("not positive definite")
        return measure(strength)

    return measured


@pytest.mark.parametrize("limit", [0.003, 0.5, 2.0, 5e4])
def test_what_cannot_be_factored_is_the_end_of_the_range(limit):
    with pytest.warns(SafeDeltaWarning, match="stays milder than strength .*not positive definite"):
        found = search_strength(Ridge(), AUTO, solvable_up_to(limit, rising(Ridge(), 1e9)), 3)
    assert found.outcome == "strictest fails"
    assert limit / 10 <= found.strength <= limit
    strengths = [trial.strength for trial in found.trials]
    assert max(strengths) == found.strength and len(set(strengths)) == len(strengths)


@pytest.mark.parametrize("limit", [0.003, 0.5])
def test_a_search_that_begins_beyond_the_range_finds_what_is_within(limit):
    with pytest.warns(SafeDeltaWarning, match="stays milder"):
        found = search_strength(Ridge(), AUTO, solvable_up_to(limit, rising(Ridge(), 0.0005)), 3)
    assert found.outcome == "found" and 1 <= found.strength / 0.0005 <= AUTO.precision * (1 + 1e-9)


def test_moments_that_no_strength_can_factor_are_a_named_error():
    with pytest.warns(SafeDeltaWarning), pytest.raises(FactorisationError, match="at any strength that a search tries"):
        search_strength(Ridge(), AUTO, solvable_up_to(0.0, rising(Ridge(), 1.0)), 3)
