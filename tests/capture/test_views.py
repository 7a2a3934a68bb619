"""Weights are followed through memory that backends free, fill again and hand over."""

import gc

import torch
from torch import nn

from safedelta_hf.capture.views import TensorTracker


def test_a_weight_that_is_fetched_again_is_followed_once():
    tracker, memory = TensorTracker(), torch.zeros(12)
    weight = nn.Parameter(memory.view(3, 4))
    for _ in range(5):
        tracker.track(weight, "w")
        tracker.forget_the_dead()
    assert tracker.of(weight.T).shape == (4, 3)
    assert sum(map(len, tracker._layouts.values())) == 1
    for _ in range(5):
        tracker.track(nn.Parameter(torch.zeros(3, 4)), "w")
        gc.collect()
        tracker.forget_the_dead()
    assert sum(map(len, tracker._layouts.values())) == 1
    assert len(tracker._own) == 1


def test_memory_that_is_handed_to_another_weight_is_that_weight():
    tracker, memory = TensorTracker(), torch.zeros(12)
    one, other = nn.Parameter(memory[:6].view(2, 3)), nn.Parameter(memory[6:].view(2, 3))
    tracker.track(one, "one")
    tracker.track(other, "other")
    assert (tracker.name_of(one), tracker.name_of(other[1])) == ("one", "other")
    one.data = torch.empty(0)
    another = nn.Parameter(memory[:8].view(4, 2))  # reaches into what the second one had
    other.data = torch.empty(0)
    tracker.track(another, "another")
    assert tracker.of(another[3]).start == 6
    assert {tracker.name_of(memory[place : place + 1]) for place in range(8)} == {"another"}


def test_of_two_weights_in_the_same_memory_the_first_counts():
    tracker, memory = TensorTracker(), torch.zeros(6)
    one, other = nn.Parameter(memory.view(2, 3)), nn.Parameter(memory.view(2, 3))
    tracker.track(one, "one")
    tracker.track(other, "other")
    assert tracker.name_of(other) == "one"


def test_a_weight_that_is_overwritten_in_place_stays_a_weight_and_a_copy_does_not():
    tracker, weight, computed = TensorTracker(), nn.Parameter(torch.zeros(2, 3)), torch.zeros(2, 3)
    tracker.track(weight, "w")
    tracker.track(computed, "computed", is_computed=True)
    copy = torch.zeros(2, 3)
    tracker.derive(copy, tracker.of(weight))
    assert not tracker.forget(weight)
    assert tracker.forget(copy)
    assert tracker.forget(computed)
    assert [tracker.name_of(tensor) for tensor in (weight, copy, computed)] == ["w", None, None]
