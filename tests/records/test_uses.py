"""A use is a strided matrix view: of every role and shape, the matrix that was written out for it before."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.deltas.dense import as_strided
from safedelta_hf.records.uses import MatrixView, Role, moment_key
from tests.fixtures.problems import SHAPES_BY_ROLE, SIZES


def written_out(values, role):
    """Oracle: the [rows, columns] matrix of each role."""
    if role in (Role.SCALE, Role.OFFSET):
        return values.view(1, -1)
    if role is Role.BIAS:
        return values.view(-1, 1)
    return values.T if role in (Role.CONV1D, Role.EMBEDDING) else values.flatten(1)


def same_memory(one, other):
    """Whether two tensors are the same entries in the same order, as far as memory tells."""
    strides = [
        [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1] for tensor in (one, other)
    ]
    return one.shape == other.shape and one.data_ptr() == other.data_ptr() and strides[0] == strides[1]


@pytest.mark.parametrize("role", list(Role))
@given(data=st.data())
def test_the_view_of_each_role_is_its_matrix_written_out(role, data):
    values = torch.zeros(data.draw(SHAPES_BY_ROLE[role]))
    view = role.view(values.shape)
    assert same_memory(as_strided(values, view), written_out(values, role))
    assert view.covers(values.numel()) and view.fits(values.numel())


VIEWS = st.builds(
    MatrixView,
    start=st.integers(0, 70),
    rows=SIZES,
    columns=SIZES,
    row_stride=st.integers(1, 12),
    column_stride=st.integers(1, 12),
)


@given(st.lists(SIZES, min_size=1, max_size=4).map(tuple), st.sampled_from(list(Role)), VIEWS, VIEWS)
def test_two_uses_of_a_parameter_have_the_same_key_only_if_they_are_the_same(shape, role, one, other):
    keys = [moment_key("w", role, view, shape) for view in (one, other, role.view(shape))]
    for left, right in itertools.combinations(zip((one, other, role.view(shape)), keys, strict=True), 2):
        assert (left[0] == right[0]) == (left[1] == right[1])
    assert keys[2] == f"w:{role}"
    assert len({moment_key("w", each, one, shape) for each in Role}) == len(Role)


def test_keys_name_an_expert_by_its_number_and_other_parts_by_their_place():
    expert = MatrixView.contiguous(4, 5, start=40)
    assert moment_key("w", Role.LINEAR, expert, (3, 4, 5)) == "w[2]:linear"
    assert moment_key("w", Role.LINEAR, expert.transposed, (3, 4, 5)) == "w[2.T]:linear"
    assert moment_key("w", Role.LINEAR, MatrixView.contiguous(4, 5, start=20), (8, 5)) == "w[20+4x5]:linear"
    columns = MatrixView(start=3, rows=4, columns=2, row_stride=8, column_stride=1)
    assert moment_key("w", Role.LINEAR, columns, (4, 8)) == "w[3+4x2@8,1]:linear"


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_views_of_the_same_entries_in_the_same_order_are_equal(rows, columns, transposed):
    view = MatrixView(rows=rows, columns=columns, row_stride=columns, column_stride=1)
    if rows == 1:
        assert view == replace(view, row_stride=7)
    if columns == 1:
        assert view == replace(view, column_stride=7)
    assert view.transposed.transposed == view
    assert (view == view.transposed) == (rows == columns == 1)
    seen = view.transposed if transposed else view
    assert seen.covers(rows * columns) and not seen.covers(rows * columns + 1)
    assert not replace(seen, start=1).covers(rows * columns) and not replace(seen, start=1).fits(rows * columns)


def test_a_view_fits_as_long_as_its_last_entry_is_one_of_the_parameter():
    whole = MatrixView.contiguous(4, 3)
    for view in (whole, whole.transposed, replace(whole, start=3, rows=3)):
        assert view.fits(12)
    for wrong in (
        replace(whole, start=1),
        replace(whole, start=2**47),
        replace(whole, rows=5),
        replace(whole, row_stride=4),
        replace(whole, column_stride=2),
        replace(whole, start=3),
        replace(whole, rows=8, row_stride=1),  # it ends within the parameter and has more entries
    ):
        assert not wrong.fits(12)
