from dataclasses import replace

import pytest

from safedelta_hf.adjust.plan import check_moments
from safedelta_hf.errors import ProfileError
from safedelta_hf.model.adjust import plan_model
from safedelta_hf.records import MatrixView, Role, Treatment
from tests.fixtures import adapters, tiny

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def profile():
    return adapters.profile_of(tiny.llama())


def planned(profile, name, **changes):
    uses = tuple(replace(use, **changes) if use.parameter == name else use for use in profile.uses)
    return plan_model(tiny.llama(), replace(profile, uses=uses), Treatment())


def test_a_part_fits_as_long_as_its_last_entry_is_one_of_the_parameter(profile):
    rows, columns = tiny.llama().get_parameter(NAME).shape
    part = MatrixView(start=0, rows=rows, columns=columns, row_stride=columns, column_stride=1)
    assert planned(profile, NAME, view=part).entries
    transposed = replace(part, rows=columns, columns=rows, row_stride=1, column_stride=columns)
    assert planned(profile, NAME, view=transposed).entries
    assert planned(profile, NAME, view=replace(part, start=columns, rows=rows - 1)).entries
    for wrong in (
        replace(part, start=1),
        replace(part, start=2**47),
        replace(part, rows=rows + 1),
        replace(part, row_stride=columns + 1),
        replace(part, column_stride=2),
        replace(part, start=columns),
        replace(part, rows=2 * rows, row_stride=1),  # it ends within the parameter and has more entries
    ):
        with pytest.raises(ProfileError, match=f"{NAME}: has the shape .* does not fit"):
            planned(profile, NAME, view=wrong)


@pytest.mark.parametrize("role", [Role.LINEAR, Role.HEAD, Role.CONV1D, Role.CONVOLUTION])
def test_a_vector_that_is_used_as_a_matrix_needs_the_moment_of_one(profile, role):
    name = "model.norm.weight"
    plan = planned(profile, name, role=role)
    (entry,) = (entry for entry in plan.entries if entry.parameter == name)
    assert entry.uses[0].view.rows == 1
    with pytest.raises(ProfileError, match=rf"{name}: has 16 inputs, its moment in the profile has the shape \[16\]"):
        check_moments(entry, profile.moments)
