"""The projector on what the safety data hardly uses, against an eigendecomposition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.curvature import quadratic_loss
from safedelta_hf.core.null_space import null_space
from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.errors import NumericalError
from safedelta_hf.records.uses import MatrixView
from tests.fixtures.problems import layer, layers

shares = st.sampled_from([0.0, 1e-4, 0.01, 0.2, 0.9])


def by_hand(hessian, energy):
    """Directions one by one, from the one that is used least, while there is energy left."""
    values, vectors = torch.linalg.eigh(hessian.double())
    projector, spent, largest = torch.zeros_like(hessian, dtype=torch.float64), 0.0, 0.0
    for value, vector in zip(values.clamp_min(0), vectors.T, strict=True):
        if value < len(values) * 1.2e-7 * float(values[-1]):
            value = 0 * value
        spent += float(value)
        if spent > energy * float(values.sum()) * (1 + 1e-6):
            break
        projector += vector.outer(vector)
        largest = float(value)
    return projector, largest


@given(layers, shares)
def test_the_projector_is_that_of_an_eigendecomposition(problem, energy):
    delta, hessian = problem
    projector, largest = by_hand(hessian, energy)
    found = null_space(hessian, energy)
    kept = found(delta)
    torch.testing.assert_close(kept.double(), delta.double() @ projector, rtol=1e-4, atol=1e-4 * float(delta.norm()))
    torch.testing.assert_close(found(kept), kept, rtol=1e-4, atol=1e-5 * float(delta.norm()))
    loss = quadratic_loss(DenseMatrix(kept.contiguous(), MatrixView.contiguous(*kept.shape)).inner, hessian)
    assert loss <= 0.5 * largest * float(delta.square().sum()) * 1.001 + 1e-5 * float(hessian.norm()) * float(
        delta.square().sum()
    )


def test_of_a_diagonal_what_is_used_least_is_kept():
    diagonal = torch.tensor([4.0, 0.0, 1.0, 5.0])
    for energy, kept in ((0.0, [0, 1, 0, 0]), (0.1, [0, 1, 1, 0]), (0.5, [1, 1, 1, 0]), (1.0, [1, 1, 1, 1])):
        assert null_space(diagonal, energy)(torch.ones(1, 4)).tolist() == [kept]


def test_all_of_it_is_kept_bit_for_bit_at_the_whole_energy_and_where_nothing_is_used():
    delta, hessian = layer(0, 3, 8, 20)
    assert torch.equal(null_space(hessian, 1.0)(delta), delta)
    assert torch.equal(null_space(torch.zeros(8, 8), 0.0)(delta), delta)


def test_a_hessian_that_is_no_number_is_named():
    with pytest.raises(NumericalError, match="NaN"):
        null_space(torch.full((2, 2), torch.nan), 0.1)
