import re
from dataclasses import replace

import pytest

from safedelta_hf.adjust.plan import check_entries
from safedelta_hf.errors import ProfileError
from safedelta_hf.model.adjust import plan_model
from safedelta_hf.records.plan import Treatment
from safedelta_hf.records.uses import Role
from safedelta_hf.rules import Ridge
from tests.fixtures import adapters, tiny

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def profile():
    return adapters.profile_of(tiny.llama())


def checked(profile, name, **changes):
    """Plan with one use changed, and check its parameter."""
    uses = tuple(replace(use, **changes) if use.parameter == name else use for use in profile.uses)
    plan = plan_model(tiny.llama(), replace(profile, uses=uses), Treatment())
    (entry,) = (entry for entry in plan.entries if entry.parameter == name)
    check_entries([entry], profile, Ridge(strength=1.0), None, is_dense=lambda name: True)
    return entry


@pytest.mark.parametrize("shape", [(24, 8), (24, 32), (16, 24), (384,), (24, 16, 1)])
def test_a_profile_of_a_model_of_other_shapes_is_refused(profile, shape):
    assert checked(profile, NAME, shape=(24, 16)).uses
    message = f"{NAME}: has the shape [24, 16], and {list(shape)} in the model that the profile was made for"
    with pytest.raises(ProfileError, match=re.escape(message)):
        checked(profile, NAME, shape=shape)


@pytest.mark.parametrize("role", [Role.LINEAR, Role.HEAD, Role.CONV1D, Role.CONVOLUTION])
def test_a_vector_that_is_used_as_a_matrix_needs_the_moment_of_one(profile, role):
    name = "model.norm.weight"
    assert checked(profile, name).uses[0].view.rows == 1
    with pytest.raises(ProfileError, match=rf"{name}: has 16 inputs, its moment in the profile has the shape \[16\]"):
        checked(profile, name, role=role)
