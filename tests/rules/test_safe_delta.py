import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.records.uses import Role
from safedelta_hf.rules import RULES, LayerMoments, SafeDelta
from tests.fixtures import oracles
from tests.fixtures.problems import layers

strengths = st.floats(0.0, 1e4)
compensations = st.sampled_from(["joint", "sequential", "none"])


def adjusted(rule, delta, hessian, role=Role.LINEAR):
    view = DenseMatrix(delta, role.view(delta.shape))
    return view.transformed(rule.transform(rule.factorise(LayerMoments(safety=hessian)), view))


@pytest.mark.parametrize(
    "settings",
    [
        {"strength": -0.1},
        {"strength": float("nan")},
        {"strength": "strong"},
        {"strength": True},
        {"strength": None},
        {"exclude_top": 1.5},
        {"exclude_top": -0.1},
        {"damping": 0.0},
        {"damping": math.inf},
        {"compensation": "both"},
        {"block": 6},
        {"block": 0},
        {"block": 8.0},
    ],
)
def test_values_out_of_range_are_named_errors(settings):
    (name,) = settings
    with pytest.raises(ConfigurationError, match=f"SafeDelta: {name}="):
        SafeDelta(**settings)


def test_defaults_are_the_published_ones():
    assert SafeDelta().settings == {
        "strength": 0.1,
        "compensation": "joint",
        "exclude_top": 0.15,
        "damping": 0.01,
        "block": 2048,
    }
    assert RULES["safe_delta"] is SafeDelta


@given(layers, compensations)
def test_zero_strength_is_the_base(problem, compensation):
    delta, hessian = problem
    assert not adjusted(SafeDelta(strength=0.0, compensation=compensation), delta, hessian).any()


@given(layers, compensations)
def test_infinite_strength_without_exclusion_is_tuned(problem, compensation):
    delta, hessian = problem
    rule = SafeDelta(strength=math.inf, exclude_top=0.0, compensation=compensation)
    assert torch.equal(adjusted(rule, delta, hessian), delta)


@given(layers, strengths, compensations)
def test_zero_delta_stays_zero(problem, strength, compensation):
    delta, hessian = problem
    rule = SafeDelta(strength=strength, compensation=compensation)
    assert not adjusted(rule, torch.zeros_like(delta), hessian).any()


@given(layers, strengths)
def test_the_kept_columns_do_not_depend_on_the_compensation(problem, strength):
    delta, hessian = problem
    rules = [SafeDelta(strength=strength, compensation=name, block=8) for name in ("joint", "sequential", "none")]
    kept = [
        rule.transform(
            rule.factorise(LayerMoments(safety=hessian)), DenseMatrix(delta, Role.LINEAR.view(delta.shape))
        ).kept
        for rule in rules
    ]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


@given(layers, strengths)
def test_joint_leaves_the_least_loss_of_all_compensations(problem, strength):
    delta, hessian = problem
    curvature = SafeDelta().factorise(LayerMoments(safety=hessian)).hessian
    joint, sequential, none = (
        oracles.loss(adjusted(SafeDelta(strength=strength, compensation=name), delta, hessian), curvature)
        for name in ("joint", "sequential", "none")
    )
    assert joint <= sequential * (1 + 1e-4) and joint <= none * (1 + 1e-4)


class Shards:
    """Statistics of a delta whose rows are spread over ranks."""

    def __init__(self, parts):
        self.parts = [DenseMatrix(part, Role.LINEAR.view(part.shape)) for part in parts]
        self.rows = sum(part.rows for part in self.parts)

    def column_energy(self, transform=None):
        return sum(part.column_energy(transform) for part in self.parts)


@given(layers, strengths, compensations, st.integers(0, 12))
def test_rows_on_several_ranks_give_the_rows_of_one(problem, strength, compensation, cut):
    delta, hessian = problem
    rule = SafeDelta(strength=strength, compensation=compensation, block=8)
    whole = adjusted(rule, delta, hessian)
    parts = [delta[:cut], delta[cut:]]
    transform = rule.transform(rule.factorise(LayerMoments(safety=hessian)), Shards(parts))
    torch.testing.assert_close(torch.cat([transform(part) for part in parts]), whole, rtol=1e-4, atol=1e-4)


@given(layers, strengths)
def test_a_low_rank_delta_keeps_its_left_factor(problem, strength):
    delta, hessian = problem
    left, right = torch.randn(9, 2), delta[:1].repeat(2, 1) * torch.tensor([[1.0], [0.5]])
    rule = SafeDelta(strength=strength)
    view = DenseMatrix(left @ right, Role.LINEAR.view((9, right.shape[1])))
    transform = rule.transform(rule.factorise(LayerMoments(safety=hessian)), view)
    torch.testing.assert_close(left @ transform(right), view.transformed(transform), rtol=1e-4, atol=1e-4)


def test_tokens_that_the_safety_data_never_uses_keep_their_delta():
    delta, counts = torch.randn(10, 4), torch.tensor([0.0, 3, 0, 1, 7, 0, 2, 2, 0, 5])
    result = adjusted(SafeDelta(strength=0.0), delta, counts, Role.EMBEDDING)
    assert torch.equal(result[counts == 0], delta[counts == 0])
    assert not result[counts > 0].any()


def test_rarer_tokens_are_kept_first():
    delta, counts = torch.ones(6, 4), torch.tensor([1.0, 2, 4, 8, 16, 32])
    strength = 7 * 4 / (counts.mean() / 2 * 4 / 4096)
    result = adjusted(SafeDelta(strength=float(strength) * 1.001), delta, counts, Role.EMBEDDING)
    assert result[:, 0].tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("role", [Role.SCALE, Role.BIAS])
def test_norms_and_biases_reach_both_limits(role):
    delta, hessian = torch.randn(6), torch.rand(6 if role is Role.SCALE else 1) + 0.1
    assert not adjusted(SafeDelta(strength=0.0), delta, hessian, role).any()
    assert torch.equal(adjusted(SafeDelta(strength=math.inf), delta, hessian, role), delta)
