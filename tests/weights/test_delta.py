import pytest
import torch

from safedelta_hf.core.transform import Dense
from safedelta_hf.records import Role
from safedelta_hf.weights.delta import MatrixDelta, recombine

SHAPES = {
    Role.LINEAR: (5, 3),
    Role.HEAD: (5, 3),
    Role.CONV1D: (3, 5),
    Role.EMBEDDING: (3, 5),
    Role.SCALE: (3,),
    Role.BIAS: (5,),
}


def as_matrix(delta, role):
    """Oracle: the [rows, columns] matrix of each role, written out."""
    if role in (Role.LINEAR, Role.HEAD):
        return delta
    if role in (Role.CONV1D, Role.EMBEDDING):
        return delta.T
    return delta[None, :] if role is Role.SCALE else delta[:, None]


@pytest.mark.parametrize("role", list(Role))
def test_each_role_is_laid_out_with_one_column_for_each_input(role):
    delta = torch.randn(SHAPES[role])
    view, matrix = MatrixDelta(delta, role), as_matrix(delta, role)
    assert (view.rows, view.columns) == matrix.shape
    torch.testing.assert_close(view.column_energy(), matrix.square().sum(0))


@pytest.mark.parametrize("role", list(Role))
def test_a_transform_multiplies_from_the_right_and_keeps_the_shape(role):
    delta = torch.randn(SHAPES[role])
    matrix = as_matrix(delta, role)
    transform = Dense(matrix=torch.randn(matrix.shape[1], matrix.shape[1]))
    result = MatrixDelta(delta, role).transformed(transform)
    assert result.shape == delta.shape
    torch.testing.assert_close(as_matrix(result, role), matrix @ transform.matrix)
    inner = MatrixDelta(delta, role).inner(transform)
    assert inner == pytest.approx(float((matrix * (matrix @ transform.matrix)).sum()), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_bit_identical_to_tuned_and_what_is_dropped_to_base(dtype):
    base = torch.randn(40, 40).to(dtype)
    tuned = (base.float() + 1e-3 * torch.randn(40, 40)).to(dtype)
    delta = tuned.float() - base.float()
    kept = torch.arange(40) % 2 == 0
    result = recombine(tuned, base, delta, torch.where(kept, delta, 0.0))
    assert result.dtype == dtype
    assert torch.equal(result[:, kept], tuned[:, kept])
    assert torch.equal(result[:, ~kept], base[:, ~kept])
