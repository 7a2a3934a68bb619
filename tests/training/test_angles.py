"""Angles between the hidden states of queries, and where they begin to tell malicious ones apart."""

import math

import pytest
import torch

from safedelta_hf.errors import DataError
from safedelta_hf.training.angles import angle_curves, initial_range


def oracle(normal, malicious, pairs, seed):
    draw = torch.Generator().manual_seed(seed)
    one = torch.randint(len(normal), (pairs,), generator=draw)
    two = (one + torch.randint(1, len(normal), (pairs,), generator=draw)) % len(normal)
    three = torch.randint(len(malicious), (pairs,), generator=draw)

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
        return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))

    layers = range(normal.shape[1])
    normals = [[cosine(normal[a, k], normal[b, k]) for a, b in zip(one, two, strict=True)] for k in layers]
    mixed = [[cosine(normal[a, k], malicious[c, k]) for a, c in zip(one, three, strict=True)] for k in layers]
    gap = [sum(math.acos(m) - math.acos(n) for n, m in zip(normals[k], mixed[k], strict=True)) / pairs for k in layers]
    return [sum(row) / pairs for row in normals], [sum(row) / pairs for row in mixed], gap


def test_curves_are_those_of_a_loop_over_pairs():
    torch.manual_seed(0)
    normal, malicious = torch.randn(5, 3, 6).double(), torch.randn(4, 3, 6).double() + 0.5
    found = angle_curves(normal, malicious, pairs=30, seed=3)
    for mine, theirs in zip(oracle(normal, malicious, 30, 3), (found.normal, found.malicious, found.gap), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-9)


def test_a_query_is_never_paired_with_itself():
    normal = torch.eye(4).unsqueeze(1)
    assert angle_curves(normal, normal, pairs=200).normal == (0.0,)


def test_equal_states_have_no_gap_though_rounding_leaves_the_unit_interval():
    states = torch.full((3, 2, 7), 0.1)
    assert angle_curves(states, states).gap == (0.0, 0.0)


def test_curves_need_two_normal_queries():
    with pytest.raises(DataError, match="1 normal"):
        angle_curves(torch.zeros(1, 2, 3), torch.zeros(2, 2, 3))


@pytest.mark.parametrize(
    "gap, expected",
    [
        ([0, 0, 0.1, 0.2, 0.3, 0.31, 0.32], (2, 4)),
        ([0, 0.3, 0, 0, 0.1, 0.3, 0.4, 0.4], (4, 6)),
        ([0.2, 0.2, 0.2], (0, 0)),
        ([0, 0, 0, 0.4], (3, 3)),
        ([0, 0.01, 0.04], None),
    ],
    ids=["ramp", "blip", "first layer", "last layer", "none"],
)
def test_the_initial_range_is_the_first_steep_rise(gap, expected):
    assert initial_range(gap, least=0.05) == expected
