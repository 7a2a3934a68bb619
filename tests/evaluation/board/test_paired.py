import itertools
import math
import random

import pytest

from safedelta_hf.evaluation.board import paired


def compared(values, others, unit="share"):
    return paired("score", "one", "other", values, others, unit)


def by_hand(more, fewer):
    """Twice the smaller tail of a fair coin, summed term by term."""
    tosses = more + fewer
    tail = sum(math.comb(tosses, heads) for heads in range(min(more, fewer) + 1)) / 2**tosses
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (5, 0), (9, 2), (3, 3), (2, 17)])
def test_yes_or_no_is_tested_by_the_prompts_that_part(more, fewer):
    values, others = [1] * more + [0] * fewer + [1, 0] * 10, [0] * more + [1] * fewer + [1, 0] * 10
    found = compared(values, others)
    assert (found.test, found.more, found.fewer, found.count) == ("exact McNemar", more, fewer, more + fewer + 20)
    assert found.p_value == pytest.approx(by_hand(more, fewer))
    assert found.value == pytest.approx((more - fewer) / found.count) and found.low < found.value < found.high


def test_means_are_tested_by_all_signs_of_their_differences():
    rng = random.Random(0)
    others = [rng.random() for _ in range(9)]
    values = [other + rng.gauss(0.4, 0.5) for other in others]
    differences = [one - other for one, other in zip(values, others, strict=True)]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=9)
    ]
    exact = sum(abs(one) >= abs(sum(differences)) - 1e-12 for one in sums) / len(sums)
    found = compared(values, others, "nats/token")
    assert found.test == "permutation of signs" and found.p_value == pytest.approx(exact, abs=0.015)
    assert found.low < found.value < found.high and found.value == pytest.approx(sum(differences) / 9)


def test_p_values_are_no_smaller_than_chance_makes_them_and_intervals_cover():
    rng = random.Random(1)
    rejected = covered = 0
    for _ in range(2000):
        values, others = ([int(rng.random() < 0.3) for _ in range(40)] for _ in range(2))
        found = compared(values, others)
        rejected += found.p_value <= 0.05
        covered += found.low <= 0 <= found.high
    assert rejected <= 0.055 * 2000 and covered >= 0.93 * 2000


def test_models_that_say_the_same_do_not_differ():
    for values in ([0, 1, 1], [0.25, 0.5, 1.0]):
        found = compared(values, values)
        assert (found.value, found.p_value) == (0, 1)


def test_prompts_without_a_value_of_both_are_left_out():
    found = compared([1, None, 0, 1], [0, 1, None, 1])
    assert (found.count, found.more, found.fewer) == (2, 1, 0)
    assert compared([None], [1]).p_value is None
