import math

import pytest
import torch

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import MergeInput, Scale, Slerp
from tests.fixtures.problems import merge_input


def test_slerp_of_a_small_delta_is_scale():
    rule = Slerp(strength=1.5)
    given = merge_input(rule)
    small = MergeInput(name=given.name, base=given.base, delta=1e-3 * given.delta)
    torch.testing.assert_close(rule.merged(small).values, small.delta / 2.5)
    assert (Slerp.search_range, Slerp.mildest) == (Scale.search_range, Scale.mildest)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slerp(strength=-1.0), "Slerp: strength=-1.0"),
        (lambda: Slerp(strength=math.inf), "Slerp: strength=inf"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
