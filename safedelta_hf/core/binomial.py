"""Exact bounds on a share, from how many of independent examples were counted (Clopper and Pearson, 1934)."""

from bisect import bisect_left
from math import exp, fsum, inf, lgamma, log, log1p, nextafter

MOST_EXAMPLES = 10**12
"""Numbers of examples beyond it are not looked at."""


def at_most(count: int, examples: int, share: float) -> float:
    """Probability that at most so many of independent examples are counted.

    It is the p-value of the hypothesis that more than that share of all would be.

    Args:
        count: How many, at least 0.
        examples: Number of examples.
        share: Probability that one of them is, in [0, 1].

    Returns:
        The binomial distribution function.
    """
    if count >= examples:
        return 1.0
    if not 0 < share < 1:
        return 1.0 if share <= 0 else 0.0
    odds, none = log(share) - log1p(-share), examples * log1p(-share)
    logs = (_log_choose(examples, one) + one * odds + none for one in range(count + 1))
    return min(fsum(map(exp, logs)), 1.0)


def upper_bound(count: int, examples: int, confidence: float) -> float:
    """Share that is not exceeded, with that confidence, where so many of the examples were counted.

    The one-sided bound of Clopper and Pearson: `P(X <= count) = 1 - confidence` at it.

    Args:
        count: How many were.
        examples: Number of examples.
        confidence: How often the bound holds, at least, in (0, 1).

    Returns:
        The bound, rounded upwards; 1 where all of them were counted, or there are none.
    """
    low, high = 0.0, 1.0
    while nextafter(low, inf) < (middle := (low + high) / 2) < high:
        if at_most(count, examples, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def most_allowed(examples: int, share: float, confidence: float) -> int | None:
    """How many of the examples may be counted for the share to be certain.

    Args:
        examples: Number of examples.
        share: What the bound may be, in (0, 1).
        confidence: Of the bound.

    Returns:
        The number; None if the share is not certain even where none is.
    """
    fails = bisect_left(range(examples + 1), True, key=lambda count: at_most(count, examples, share) > 1 - confidence)
    return fails - 1 if fails else None


def examples_needed(count: int, share: float, confidence: float) -> int:
    """How many examples make a share certain, if so many of them are counted.

    Args:
        count: How many are.
        share: What the bound may be, in (0, 1).
        confidence: Of the bound.

    Returns:
        The least number.
    """
    numbers = range(MOST_EXAMPLES)
    return bisect_left(numbers, True, key=lambda examples: at_most(count, examples, share) <= 1 - confidence)


def _log_choose(examples: int, count: int) -> float:
    return lgamma(examples + 1) - lgamma(count + 1) - lgamma(examples - count + 1)
