"""Settings of a polish."""

import pytest

from safedelta_hf import PolishConfig
from safedelta_hf.errors import ConfigurationError


def test_steps_are_a_number_or_a_share_of_those_of_the_run():
    assert PolishConfig(steps=7).steps_of(-1) == 7
    assert PolishConfig(steps=0.5).steps_of(9) == 5
    assert PolishConfig(steps=0).steps_of(100) == 0
    with pytest.raises(ConfigurationError, match="how many those were is not known"):
        PolishConfig(steps=0.5).steps_of(-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": -1},
        {"steps": True},
        {"rate": 0},
        {"holdout": 1.0},
        {"batch_size": 1.5},
        {"top_k": 0},
        {"tolerance": 0},
    ],
)
def test_a_value_outside_its_range_is_named(wrong):
    (name,) = wrong
    with pytest.raises(ConfigurationError, match=f"PolishConfig: {name}="):
        PolishConfig(**wrong)
