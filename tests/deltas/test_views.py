"""A use is a strided matrix view: of every role and shape, the matrix that was written out for it before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.deltas.dense import _as_matrix, as_strided
from safedelta_hf.records import MatrixView, Role

SIZES = st.integers(1, 6)
MATRIX = st.tuples(SIZES, SIZES)
ANY = st.lists(SIZES, min_size=1, max_size=4).map(tuple)
SHAPES = {
    Role.LINEAR: MATRIX,
    Role.HEAD: MATRIX,
    Role.CONV1D: MATRIX,
    Role.EMBEDDING: MATRIX,
    Role.SCALE: ANY,
    Role.OFFSET: ANY,
    Role.BIAS: ANY,
    Role.CONVOLUTION: st.lists(SIZES, min_size=3, max_size=5).map(tuple),
}


def same_memory(one, other):
    """Whether two tensors are the same entries in the same order, as far as memory tells."""
    strides = [
        [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1] for tensor in (one, other)
    ]
    return one.shape == other.shape and one.data_ptr() == other.data_ptr() and strides[0] == strides[1]


@pytest.mark.parametrize("role", list(Role))
@given(data=st.data())
def test_the_view_of_each_role_is_its_matrix_written_out(role, data):
    values = torch.zeros(data.draw(SHAPES[role]))
    view = role.view(values.shape)
    assert same_memory(as_strided(values, view), _as_matrix(values, role, None))
    assert view.covers(values.numel()) and view.fits(values.numel())
