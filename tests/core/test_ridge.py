import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.ridge import shrinkage, utility_of
from safedelta_hf.errors import NumericalError
from tests.fixtures import oracles
from tests.fixtures.problems import layer, layers

strengths = st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e4])


def task_moment(delta, seed=7):
    return layer(seed, 1, delta.shape[1], 40)[1]


def rounding(utility, hessian, strength):
    """What float32 can promise of a solution: some multiples of its precision times the condition number."""
    return 1e-5 + 10 * torch.finfo(torch.float32).eps * float(
        torch.linalg.cond((utility + strength * hessian).double())
    )


def objective(candidate, delta, utility, hessian, strength):
    """What task ridge minimises, in float64."""
    moved, candidate = (candidate - delta).double(), candidate.double()
    task = torch.trace(moved @ utility.double() @ moved.T)
    return float(task + strength * torch.trace(candidate @ hessian.double() @ candidate.T))


@given(layers, strengths)
def test_ridge_is_the_closed_form(problem, strength):
    delta, hessian = problem
    found = shrinkage(hessian, None, strength)(delta)
    expected = oracles.ridge(delta, torch.eye(len(hessian)), hessian, strength)
    assert (found - expected).norm() <= rounding(torch.eye(len(hessian)), hessian, strength) * delta.norm()


@given(layers, strengths)
def test_task_ridge_is_the_closed_form(problem, strength):
    delta, hessian = problem
    utility = utility_of(task_moment(delta), 0.1)
    found = shrinkage(hessian, utility, strength)(delta)
    expected = oracles.ridge(delta, utility, hessian, strength)
    assert (found - expected).norm() <= rounding(utility, hessian, strength) * delta.norm()


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_no_other_adjustment_has_a_lower_objective(strength):
    delta, hessian = layer(3, 4, 6, 20)
    utility = utility_of(task_moment(delta), 0.1)
    found = shrinkage(hessian, utility, strength)(delta)
    candidate = torch.zeros_like(delta, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([candidate], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        moved = candidate - delta.double()
        value = torch.trace(moved @ utility.double() @ moved.T)
        value = value + strength * torch.trace(candidate @ hessian.double() @ candidate.T)
        value.backward()
        return value

    optimiser.step(closure)
    best = objective(candidate.detach(), delta, utility, hessian, strength)
    assert objective(found, delta, utility, hessian, strength) <= best * (1 + 1e-5)
    torch.testing.assert_close(found.double(), candidate.detach(), rtol=1e-3, atol=1e-4)


@given(layers, strengths)
def test_a_diagonal_is_the_matrix_with_that_diagonal(problem, strength):
    delta, hessian = problem
    diagonal, task = hessian.diagonal().clone(), task_moment(delta).diagonal().clone()
    whole = shrinkage(diagonal.diag(), utility_of(task.diag(), 0.1), strength)(delta)
    torch.testing.assert_close(
        shrinkage(diagonal, utility_of(task, 0.1), strength)(delta), whole, rtol=1e-3, atol=1e-3 * float(delta.norm())
    )


@given(layers)
def test_zero_strength_keeps_the_delta_bit_for_bit(problem):
    delta, hessian = problem
    assert torch.equal(shrinkage(hessian, utility_of(task_moment(delta), 0.1), 0.0)(delta), delta)


@given(st.integers(0, 1000))
def test_a_huge_strength_drops_what_the_safety_data_uses(seed):
    delta, hessian = layer(seed, 5, 8, 60)
    hessian += torch.eye(8)
    assert shrinkage(hessian, None, 1e9)(delta).norm() <= 1e-6 * delta.norm()


@given(layers)
def test_the_quadratic_loss_falls_and_the_distance_rises_with_the_strength(problem):
    delta, hessian = problem
    kept = [shrinkage(hessian, None, strength)(delta) for strength in (0.0, 0.01, 0.3, 10.0, 1e3)]
    losses = [oracles.loss(one, hessian) for one in kept]
    moved = [float((one - delta).norm()) for one in kept]
    slack = 1e-4 * losses[0] + 1e-6
    assert all(after <= before + slack for before, after in zip(losses, losses[1:], strict=False))
    assert all(after >= before - 1e-4 * float(delta.norm()) for before, after in zip(moved, moved[1:], strict=False))


def test_inputs_that_the_safety_data_never_used_keep_their_delta():
    delta, hessian = layer(5, 4, 8, 30)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    found = shrinkage(hessian, None, 100.0)(delta)
    torch.testing.assert_close(found[:, 3], delta[:, 3])


def test_massive_inputs_do_not_spoil_the_others():
    delta, hessian = layer(11, 16, 64, 400)
    scale = torch.ones(64)
    scale[5] = 1e3  # as the massive activations of language models
    hessian = scale[:, None] * hessian * scale
    task = scale[:, None] * task_moment(delta) * scale
    utility = utility_of(task, 0.1)
    for strength in (0.1, 10.0, 1e3):
        expected = oracles.ridge(delta, utility, hessian, strength)
        found = shrinkage(hessian, utility, strength)(delta)
        assert (found - expected).norm() <= 2e-2 * expected.norm()
        assert objective(found, delta, utility, hessian, strength) <= 1.01 * objective(
            expected, delta, utility, hessian, strength
        )


def test_nan_is_an_error():
    hessian = torch.eye(3)
    hessian[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        shrinkage(hessian, None, 1.0)
