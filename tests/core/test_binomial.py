"""Binomial bounds, against sums over the distribution in exact fractions."""

from fractions import Fraction
from itertools import takewhile
from math import comb, nextafter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.binomial import at_most, examples_needed, most_allowed, upper_bound

COUNTS = st.integers(1, 150).flatmap(lambda examples: st.tuples(st.integers(0, examples), st.just(examples)))
SHARES = st.floats(0.001, 0.999)
CONFIDENCES = st.sampled_from([0.5, 0.9, 0.95, 0.99])


def summed(count, examples, share):
    """Oracle: P(X <= count), term by term."""
    share = Fraction(share)
    terms = (comb(examples, one) * share**one * (1 - share) ** (examples - one) for one in range(count + 1))
    return sum(terms, Fraction(0))


@given(COUNTS, SHARES)
def test_the_distribution_is_the_sum_of_its_terms(counted, share):
    assert at_most(*counted, share) == pytest.approx(float(summed(*counted, share)), rel=1e-9, abs=1e-300)


@given(COUNTS, CONFIDENCES)
def test_the_bound_is_the_least_share_that_so_few_make_improbable(counted, confidence):
    count, examples = counted
    bound = upper_bound(count, examples, confidence)
    if count == examples:
        assert bound == 1.0
        return
    left = 1 - Fraction(confidence)
    assert summed(count, examples, bound * (1 + 1e-9) if bound < 0.999 else bound) <= left * (1 + Fraction(1, 10**6))
    assert summed(count, examples, bound * (1 - 1e-6)) > left


@given(st.integers(1, 60), CONFIDENCES, SHARES)
def test_the_bound_holds_as_often_as_it_claims(examples, confidence, share):
    missing = takewhile(lambda count: upper_bound(count, examples, confidence) < share, range(examples + 1))
    misses = sum(
        Fraction(comb(examples, count)) * Fraction(share) ** count * (1 - Fraction(share)) ** (examples - count)
        for count in missing
    )
    assert misses <= (1 - Fraction(confidence)) * (1 + Fraction(1, 10**6))


@given(st.integers(0, 150), SHARES, CONFIDENCES)
def test_as_many_are_allowed_as_keep_the_bound_within_the_share(examples, share, confidence):
    left, allowed = 1 - Fraction(confidence), most_allowed(examples, share, confidence)
    tie = left / 10**9  # three tosses of a fair coin are even odds, but for rounding
    assert allowed is None or summed(allowed, examples, share) <= left + tie
    more = 0 if allowed is None else allowed + 1
    assert more > examples or summed(more, examples, share) > left - tie


@given(st.integers(0, 4), st.floats(0.02, 0.9), CONFIDENCES)
def test_one_example_less_than_needed_would_not_do(count, share, confidence):
    needed = examples_needed(count, share, confidence)
    assert summed(count, needed, share) <= (1 - Fraction(confidence)) * (1 + Fraction(1, 10**9))
    assert needed == count + 1 or summed(count, needed - 1, share) > 1 - Fraction(confidence) - Fraction(1, 10**9)


def test_known_figures():
    assert upper_bound(0, 25, 0.95) == pytest.approx(1 - 0.05 ** (1 / 25))
    assert upper_bound(0, 30, 0.95) == pytest.approx(0.0950, abs=1e-4)
    assert (examples_needed(0, 0.05, 0.95), examples_needed(1, 0.05, 0.95)) == (59, 93)
    assert [most_allowed(examples, 0.05, 0.95) for examples in (58, 59, 92, 93, 124)] == [None, 0, 0, 1, 2]


def test_nothing_and_much_are_bounded_too():
    assert upper_bound(0, 0, 0.95) == 1.0 and most_allowed(0, 0.05, 0.95) is None
    assert upper_bound(3, 10**6, 0.95) == pytest.approx(7.753656e-6, rel=1e-5)
    assert examples_needed(0, 1e-9, 0.95) == pytest.approx(2.9957e9, rel=1e-4)
    assert at_most(2, 5, 0.0) == 1.0 and at_most(2, 5, 1.0) == 0.0
    assert at_most(0, 10, nextafter(1.0, 0)) >= 0.0
