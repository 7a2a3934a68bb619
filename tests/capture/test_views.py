"""Weights are followed through memory that backends free, fill again and hand over."""

import gc

import torch
from torch import nn

from safedelta_hf.capture.views import Origins


def test_a_weight_that_is_fetched_again_is_followed_once():
    origins, memory = Origins(), torch.zeros(12)
    weight = nn.Parameter(memory.view(3, 4))
    for _ in range(5):
        origins.track(weight, "w")
        origins.forget_the_dead()
    assert origins.of(weight.T).shape == (4, 3)
    assert sum(map(len, origins._layouts.values())) == 1
    for _ in range(5):
        origins.track(nn.Parameter(torch.zeros(3, 4)), "w")
        gc.collect()
        origins.forget_the_dead()
    assert sum(map(len, origins._layouts.values())) == 1
    assert len(origins._own) == 1


def test_memory_that_is_handed_to_another_weight_is_that_weight():
    origins, memory = Origins(), torch.zeros(12)
    one, other = nn.Parameter(memory[:6].view(2, 3)), nn.Parameter(memory[6:].view(2, 3))
    origins.track(one, "one")
    origins.track(other, "other")
    assert (origins.name_of(one), origins.name_of(other[1])) == ("one", "other")
    one.data = torch.empty(0)
    another = nn.Parameter(memory[:8].view(4, 2))  # reaches into what the second one had
    other.data = torch.empty(0)
    origins.track(another, "another")
    assert origins.of(another[3]).start == 6
    assert {origins.name_of(memory[place : place + 1]) for place in range(8)} == {"another"}


def test_of_two_weights_in_the_same_memory_the_first_counts():
    origins, memory = Origins(), torch.zeros(6)
    one, other = nn.Parameter(memory.view(2, 3)), nn.Parameter(memory.view(2, 3))
    origins.track(one, "one")
    origins.track(other, "other")
    assert origins.name_of(other) == "one"


def test_a_weight_that_is_overwritten_in_place_stays_a_weight_and_a_copy_does_not():
    origins, weight, computed = Origins(), nn.Parameter(torch.zeros(2, 3)), torch.zeros(2, 3)
    origins.track(weight, "w")
    origins.track(computed, "computed", is_computed=True)
    copy = torch.zeros(2, 3)
    origins.derive(copy, origins.of(weight))
    assert not origins.forget(weight)
    assert origins.forget(copy)
    assert origins.forget(computed)
    assert [origins.name_of(tensor) for tensor in (weight, copy, computed)] == ["w", None, None]
