"""Moments and factors are made when they are needed, once, and held no longer than the memory allows."""

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from safedelta_hf.adjust.factors import FactorCache
from safedelta_hf.core.transform import Dense
from safedelta_hf.errors import FactorisationError
from safedelta_hf.records.uses import Role
from safedelta_hf.rules import TransformRule
from tests.fixtures import by_hand
from tests.fixtures.threads import on_each

CPU = torch.device("cpu")
SIZE = 4
BYTES = 4 * SIZE * SIZE


@dataclass(frozen=True, kw_only=True)
class Recording(TransformRule):
    """Its factors are the moments; every one that it factorises is written down."""

    made: list = field(default_factory=list)

    name: ClassVar[str] = "recording"
    mildest: ClassVar[float] = 0.0

    def factorise(self, moments):
        self.made.append(moments)
        return moments

    def transform(self, factors, delta):
        return Dense(matrix=self.strength * factors.safety)


class Moment:
    """A moment that knows how often it was read and which of its Hessians live."""

    def __init__(self, value):
        self.total, self.reads, self._made = torch.full((SIZE, SIZE), float(value)), 0, []

    def hessian(self, device):
        self.reads += 1
        made = self.total.clone().to(device)
        self._made.append(weakref.ref(made))
        return made

    @property
    def live(self):
        return sum(made() is not None for made in self._made)


def uses_of(*moments):
    return [by_hand.use_of(f"w{n}", (3, SIZE), moment=key) for n, key in enumerate(moments)]


@pytest.fixture
def moments():
    return {key: Moment(value) for value, key in enumerate("abcde", start=1)}


def gone_through(cache, rule, uses, device=CPU):
    found = []
    for use in uses:
        cache.hold([use], device)
        found.append(cache.transform(rule, use, None))
    return found


def reads(moments):
    return "".join(key * moment.reads for key, moment in moments.items())


def test_a_moment_is_read_and_factorised_once_for_parameters_that_stand_together(moments):
    uses, rule = uses_of("a", "a", "a", "b", "b"), Recording(strength=1.0)
    cache = FactorCache(by_hand.profile_of(uses, moments), uses=uses)
    found = gone_through(cache, rule, uses)
    assert reads(moments) == "ab" and len(rule.made) == 2
    assert [float(transform.matrix[0, 0]) for transform in found] == [1, 1, 1, 2, 2]


def test_without_memory_no_moment_but_those_in_use_is_held(moments):
    uses = uses_of("a", "b", "c")
    cache = FactorCache(by_hand.profile_of(uses, moments), uses=uses)
    for use in [*uses, *uses]:
        cache.hold([use], CPU)
        cache.transform(Recording(strength=1.0), use, None)
        assert {key: moment.live for key, moment in moments.items() if moment.live} == {use.moment: 1}
    cache.hold(uses[:2], CPU)
    assert moments["a"].live == moments["b"].live == 1 and not moments["c"].live


def test_of_what_the_memory_has_no_room_for_the_most_recent_goes_first(moments):
    uses, rule = uses_of(*"abcde"), Recording(strength=1.0)
    cache = FactorCache(by_hand.profile_of(uses, moments), uses=uses, memory=2 * BYTES)
    gone_through(cache, rule, [*uses, *uses])
    assert reads(moments) == "abccddee"  # passes go from the first to the last, so "a" and "b" come next


@pytest.mark.parametrize(("memory", "held"), [(0, 1), (BYTES - 1, 1), (BYTES, 2), (3 * BYTES, 4), (9 * BYTES, 5)])
def test_no_more_is_held_than_the_memory_beside_what_is_in_use(memory, held, moments):
    uses = uses_of(*"abcde")
    cache = FactorCache(by_hand.profile_of(uses, moments), uses=uses, memory=memory)
    most = 0
    for use in [*uses, *uses]:
        cache.hold([use], CPU)
        most = max(most, sum(moment.live for moment in moments.values()))
    assert most == held


def test_factors_that_are_held_serve_a_rule_at_any_strength(moments):
    uses, rule = uses_of(*"abc"), Recording(strength=1.0)
    cache = FactorCache(by_hand.profile_of(uses, moments), uses=uses, memory=5 * BYTES)
    for strength in (1.0, 3.0):
        found = gone_through(cache, rule.at(strength), uses)
        assert [float(transform.matrix[0, 0]) for transform in found] == [strength, 2 * strength, 3 * strength]
    assert len(rule.made) == 3 and reads(moments) == "abc"


def test_a_hessian_may_be_asked_for_where_nothing_is_factorised(moments):
    (use,) = uses_of("b")
    cache = FactorCache(by_hand.profile_of([use], moments))
    cache.hold([use], CPU)
    assert torch.equal(cache.hessian(use), moments["b"].total)


def test_a_moment_that_is_needed_on_another_device_is_read_and_factorised_again(moments):
    (use,), rule = uses_of("a"), Recording(strength=1.0)
    cache = FactorCache(by_hand.profile_of([use], moments), uses=[use], memory=9 * BYTES)
    elsewhere = torch.device("meta")
    for device in (CPU, elsewhere, elsewhere, CPU):
        (transform,) = gone_through(cache, rule, [use], device)
        assert cache.hessian(use).device == transform.matrix.device == device
    assert moments["a"].reads == len(rule.made) == 3


def task_of(*keys):
    """A profile of the task, in which parameters have moments of their own, or none."""
    uses = [by_hand.use_of(f"w{n}", (3, SIZE), moment=key) for n, key in enumerate(keys) if key]
    return by_hand.profile_of(uses, {key: Moment(10 * (1 + n)) for n, key in enumerate(keys) if key})


def test_the_rule_is_given_the_tasks_moment_of_the_same_use_and_zeros_where_the_task_never_came(moments):
    uses, rule = uses_of("a", "a", "b"), Recording(strength=1.0)
    cache = FactorCache(by_hand.profile_of(uses, moments), task_of("x", "y", None), uses=uses)
    gone_through(cache, rule, uses)
    seen = [(float(made.safety[0, 0]), float(made.task[0, 0]), made.task.shape) for made in rule.made]
    assert seen == [(1, 10, (4, 4)), (1, 20, (4, 4)), (2, 0, (4, 4))]


def test_without_a_task_the_rule_is_given_none(moments):
    uses, rule = uses_of("a"), Recording(strength=1.0)
    gone_through(FactorCache(by_hand.profile_of(uses, moments), uses=uses), rule, uses)
    assert rule.made[0].task is None


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("with_task", [False, True])
def test_each_moment_is_factorised_by_one_rank_and_every_rank_has_the_result(size, with_task, moments):
    uses = uses_of(*"abcde", "e", "a")
    profile = by_hand.profile_of(uses, moments)
    task = task_of(*"vwxyz", "z", "v") if with_task else None

    def work(ranks):
        rule = Recording(strength=2.0)
        cache = FactorCache(profile, task, uses=uses, ranks=ranks, memory=9 * BYTES)
        found = [transform.matrix for transform in gone_through(cache, rule, uses)]
        return found, [float(made.safety[0, 0]) for made in rule.made]

    found, made = zip(*on_each(size, work), strict=True)
    for matrices in found:
        assert [float(matrix[0, 0]) for matrix in matrices] == [2, 4, 6, 8, 10, 10, 2]
    assert Counter(value for one in made for value in one) == Counter([1, 2, 3, 4, 5])
    assert max(map(len, made)) <= -(-5 // size) + 1 and min(map(len, made)) >= 1


def test_diagonals_are_factorised_when_their_turn_comes_and_not_ahead():
    uses = [by_hand.use_of(f"n{number}", (SIZE,), Role.SCALE) for number in range(4)]
    profile = by_hand.profile_of(uses)

    def work(ranks):
        rule = Recording(strength=1.0)
        cache = FactorCache(profile, uses=uses, ranks=ranks)
        cache.hold(uses[:1], CPU)
        cache.transform(rule, uses[0], None)
        return len(rule.made)

    assert on_each(2, work) == [1, 0]


@dataclass(frozen=True, kw_only=True)
class Stopping(Recording):
    """Cannot factor what is large, at its strength."""

    name: ClassVar[str] = "stopping"

    def factorise(self, moments):
        if self.strength * float(moments.safety[0, 0]) > 5:
            raise FactorisationError("not positive definite")
        return super().factorise(moments)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_one_rank_cannot_factor_stops_all_of_them_at_the_same_parameter_and_they_go_on_together(size, moments):
    uses = uses_of(*"abcde")
    profile = by_hand.profile_of(uses, moments)

    def work(ranks):
        seen = []
        for strength in (2.0, 1.0):
            cache, rule = FactorCache(profile, uses=uses, ranks=ranks), Stopping(strength=strength)
            try:
                seen.append(len(gone_through(cache, rule, uses)))
            except FactorisationError:
                seen.append("stopped")
        return seen

    assert on_each(size, work) == [["stopped", 5]] * size
