import pytest
import torch
from hypothesis import given

from safedelta_hf.core.curvature import cholesky, factorise, quadratic_loss
from safedelta_hf.errors import NumericalError
from tests.fixtures import oracles
from tests.fixtures.problems import layers


@given(layers)
def test_factor_is_upper_and_multiplies_to_the_damped_hessian(problem):
    _, hessian = problem
    curvature = factorise(hessian, 0.01)
    assert torch.equal(curvature.factor, curvature.factor.triu())
    expected = oracles.damped(hessian, 0.01)
    assert (curvature.factor @ curvature.factor.T - expected).norm() <= 1e-5 * expected.norm()


@given(layers)
def test_pivots_are_those_of_the_inverse(problem):
    _, hessian = problem
    expected = 1 / oracles.upper_factor_of_inverse(oracles.damped(hessian, 0.01)).diagonal().square()
    torch.testing.assert_close(factorise(hessian, 0.01).pivots.double(), expected, rtol=2e-2, atol=1e-6)


def test_dead_inputs_get_a_unit_diagonal():
    inputs = torch.randn(50, 6)
    inputs[:, 2] = 0
    curvature = factorise(inputs.T @ inputs, 0.01)
    torch.testing.assert_close(curvature.hessian.double(), oracles.damped(inputs.T @ inputs, 0.01))


def test_the_hessian_is_not_changed():
    hessian = torch.eye(4)
    factorise(hessian, 0.5)
    assert torch.equal(hessian, torch.eye(4))


@pytest.fixture
def float32_fails(monkeypatch):
    """LAPACK fails on every float32 matrix: on which nearly singular ones it really does depends on the processor."""
    genuine = torch.linalg.cholesky_ex

    def cholesky_ex(matrix):
        factor, info = genuine(matrix)
        if matrix.dtype == torch.float32:
            return torch.full_like(factor, float("nan")), torch.full_like(info, len(matrix))
        return factor, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)


def test_float32_failure_is_retried_in_float64_with_a_warning(float32_fails):
    matrix = torch.tensor([[3.0, 6001.0], [6001.0, 12004001.0]])  # exact in float32; the smaller pivot is 2 / 3
    with pytest.warns(UserWarning, match="float64"):
        factor, retried = cholesky(matrix)
    assert retried and factor.dtype == torch.float32
    torch.testing.assert_close(factor.double(), torch.linalg.cholesky(matrix.double()), rtol=1e-6, atol=1e-6)


def test_a_curvature_that_needed_float64_says_so(float32_fails):
    with pytest.warns(UserWarning, match="float64"):
        assert factorise(torch.eye(3), 0.01).notes == ("factorised in float64 after float32 failed",)


def test_an_indefinite_matrix_is_an_error_that_says_what_to_do():
    with pytest.warns(UserWarning), pytest.raises(NumericalError, match="raise the damping"):
        cholesky(torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_errors(value):
    with pytest.raises(NumericalError, match="NaN or Inf"):
        cholesky(torch.full((2, 2), value))


@pytest.mark.parametrize("diagonal", [False, True])
def test_quadratic_loss_is_half_the_trace(diagonal):
    delta, inputs = torch.randn(3, 6), torch.randn(20, 6)
    hessian = inputs.T @ inputs
    if diagonal:
        hessian = hessian.diagonal()
    full = torch.diag(hessian) if diagonal else hessian
    found = quadratic_loss(lambda transform: float((delta * transform(delta)).sum()), hessian)
    assert found == pytest.approx(oracles.loss(delta, full), rel=1e-5)
