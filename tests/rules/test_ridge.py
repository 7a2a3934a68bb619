import torch
from hypothesis import given

from safedelta_hf.rules import Ridge
from tests.fixtures import oracles
from tests.fixtures.problems import adjusted, layers, strengths


@given(layers, strengths)
def test_ridge_is_its_closed_form(problem, strength):
    delta, hessian = problem
    found = adjusted(Ridge(strength=strength), delta, hessian)
    assert (found - oracles.ridge(delta, torch.eye(len(hessian)), hessian, strength)).norm() <= 1e-4 * delta.norm()
