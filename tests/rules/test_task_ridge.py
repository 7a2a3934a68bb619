import math

import pytest
import torch
from hypothesis import given

from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.records.uses import Role
from safedelta_hf.rules import LayerMoments, Ridge, TaskRidge
from tests.fixtures import oracles
from tests.fixtures.problems import adjusted, layer, layers, strengths


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, "x"])
def test_a_blend_out_of_range_is_a_named_error(value):
    with pytest.raises(ConfigurationError, match="TaskRidge: blend="):
        TaskRidge(blend=value)


@given(layers, strengths)
def test_task_ridge_is_its_closed_form(problem, strength):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    utility = task + 0.1 * task.diagonal().mean() * torch.eye(len(task))
    found = adjusted(TaskRidge(strength=strength), delta, hessian, task)
    assert (found - oracles.ridge(delta, utility, hessian, strength)).norm() <= 1e-3 * delta.norm()


@given(layers)
def test_a_large_blend_of_the_norm_approaches_ridge(problem):
    delta, hessian = problem
    task = layer(9, 1, delta.shape[1], 30)[1]
    blend = 1e5
    strength = 2.0 * blend * float(task.diagonal().mean())
    found = adjusted(TaskRidge(strength=strength, blend=blend), delta, hessian, task)
    assert (found - adjusted(Ridge(strength=2.0), delta, hessian)).norm() <= 1e-2 * delta.norm()


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


def test_without_a_task_it_is_ridge_at_the_same_strength():
    assert TaskRidge(strength=3.0).without_task() == Ridge(strength=3.0) and TaskRidge().without_task() == Ridge()
    assert Ridge(strength=3.0).without_task() == Ridge(strength=3.0)
