import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.records import Role
from safedelta_hf.rules import RULES, AutoStrength, LayerMoments, Ridge, Scale, TaskRidge, default_rule
from tests.fixtures import oracles
from tests.fixtures.problems import layer, layers

strengths = st.sampled_from([0.03, 1.0, 50.0])


def adjusted(rule, delta, safety, task=None, role=Role.LINEAR):
    view = DenseMatrix(delta, role.view(delta.shape))
    return view.transformed(rule.transform(rule.factorise(LayerMoments(safety=safety, task=task)), view))


@pytest.mark.parametrize("kind", [Ridge, TaskRidge, Scale])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "strong", True, None])
def test_a_strength_that_is_none_is_a_named_error(kind, value):
    with pytest.raises(ConfigurationError, match=f"{kind.__name__}: strength="):
        kind(strength=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, "x"])
def test_a_blend_out_of_range_is_a_named_error(value):
    with pytest.raises(ConfigurationError, match="TaskRidge: blend="):
        TaskRidge(blend=value)


@pytest.mark.parametrize(
    ("field", "value"), [("tolerance", 0.0), ("tolerance", math.nan), ("quantile", 1.0), ("precision", 1.0)]
)
def test_a_search_setting_out_of_range_is_a_named_error(field, value):
    with pytest.raises(ConfigurationError, match=f"AutoStrength: {field}="):
        AutoStrength(**{field: value})


def test_auto_is_the_default_and_a_shorthand():
    assert Ridge() == Ridge(strength="auto") == Ridge(strength=AutoStrength())
    assert Ridge().auto == AutoStrength() and Ridge(strength=1.0).auto is None
    assert Ridge().at(2.0) == Ridge(strength=2.0)
    assert TaskRidge(blend=0.3).at(2.0).blend == 0.3


def test_an_unmeasured_strength_cannot_be_applied():
    delta, hessian = layer(0, 2, 3, 9)
    with pytest.raises(ConfigurationError, match="auto"):
        adjusted(Ridge(), delta, hessian)


def test_every_rule_is_registered_by_its_name():
    assert all(rule.name == name for name, rule in RULES.items())
    assert {"safe_delta", "ridge", "task_ridge", "scale"} <= set(RULES)


def test_the_default_weighs_the_task_where_it_can():
    assert default_rule(None) == Ridge() and default_rule(object()) == TaskRidge()


@given(layers, strengths)
def test_ridge_and_task_ridge_are_their_closed_forms(problem, strength):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    utility = task + 0.1 * task.diagonal().mean() * torch.eye(len(task))
    found = adjusted(Ridge(strength=strength), delta, hessian)
    assert (found - oracles.ridge(delta, torch.eye(len(hessian)), hessian, strength)).norm() <= 1e-4 * delta.norm()
    found = adjusted(TaskRidge(strength=strength), delta, hessian, task)
    assert (found - oracles.ridge(delta, utility, hessian, strength)).norm() <= 1e-3 * delta.norm()


@given(layers, strengths)
def test_scale_is_ridge_with_the_identity(problem, strength):
    delta, hessian = problem
    expected = oracles.ridge(delta, torch.eye(len(hessian)), torch.eye(len(hessian)), strength)
    torch.testing.assert_close(
        adjusted(Scale(strength=strength), delta, hessian).double(), expected, rtol=1e-5, atol=1e-6
    )


@given(layers)
def test_a_large_blend_of_the_norm_approaches_ridge(problem):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    blend = 1e5
    strength = 2.0 * blend * float(task.diagonal().mean())
    found = adjusted(TaskRidge(strength=strength, blend=blend), delta, hessian, task)
    assert (found - adjusted(Ridge(strength=2.0), delta, hessian)).norm() <= 1e-2 * delta.norm()


@given(layers, strengths)
def test_rows_held_apart_are_adjusted_as_the_whole(problem, strength):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    for rule in (Ridge(strength=strength), TaskRidge(strength=strength), Scale(strength=strength)):
        whole = adjusted(rule, delta, hessian, task)
        parts = [adjusted(rule, rows, hessian, task) for rows in delta.split(3)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@given(layers, strengths)
def test_the_factor_of_a_lora_is_adjusted_as_the_product(problem, strength):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    outer = torch.randn(5, delta.shape[0], generator=torch.Generator().manual_seed(1))
    for rule in (Ridge(strength=strength), TaskRidge(strength=strength), Scale(strength=strength)):
        product = adjusted(rule, outer @ delta, hessian, task)
        assert (outer @ adjusted(rule, delta, hessian, task) - product).norm() <= 1e-3 * (outer @ delta).norm()


def test_a_task_rule_without_task_moments_is_a_named_error():
    delta, hessian = layer(0, 2, 3, 9)
    with pytest.raises(ProfileError, match="task"):
        adjusted(TaskRidge(strength=1.0), delta, hessian)


def test_a_layer_that_the_task_never_reaches_gives_its_delta_up_and_says_so():
    delta, hessian = layer(0, 2, 3, 9)
    hessian[1], hessian[:, 1] = 0.0, 0.0
    rule, nothing = TaskRidge(strength=1.0), torch.zeros(3, 3)
    view = DenseMatrix(delta, Role.LINEAR.view(delta.shape))
    transform = rule.transform(rule.factorise(LayerMoments(safety=hessian, task=nothing)), view)
    found = view.transformed(transform)
    assert torch.equal(found[:, 1], delta[:, 1]) and not found[:, [0, 2]].any()
    assert transform.notes == ("the task data never reached it",)
    assert torch.equal(adjusted(rule.at(0.0), delta, hessian, nothing), delta)


@pytest.mark.parametrize("role", [Role.EMBEDDING, Role.SCALE, Role.BIAS])
def test_entries_that_the_safety_data_never_used_keep_their_delta(role):
    delta = torch.randn({Role.EMBEDDING: (4, 3), Role.SCALE: (4,), Role.BIAS: (4,)}[role])
    counts = torch.tensor([1.0, 0.0, 3.0, 0.0])[: 1 if role is Role.BIAS else 4]
    found = adjusted(TaskRidge(strength=5.0), delta, counts, torch.ones_like(counts), role)
    if role is not Role.BIAS:
        assert torch.equal(found[[1, 3]], delta[[1, 3]])
    assert (found.abs() <= delta.abs() + 1e-6).all() and not torch.equal(found, delta)
