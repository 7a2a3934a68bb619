import torch
from hypothesis import given

from safedelta_hf.rules import Scale
from tests.fixtures import oracles
from tests.fixtures.problems import adjusted, layers, strengths


@given(layers, strengths)
def test_scale_is_ridge_with_the_identity(problem, strength):
    delta, hessian = problem
    expected = oracles.ridge(delta, torch.eye(len(hessian)), torch.eye(len(hessian)), strength)
    torch.testing.assert_close(
        adjusted(Scale(strength=strength), delta, hessian).double(), expected, rtol=1e-5, atol=1e-6
    )
