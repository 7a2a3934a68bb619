import pytest
import torch

from safedelta_hf.core import merging
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import Ties
from tests.fixtures import merging as oracles
from tests.fixtures.problems import merge_input


def test_strength_zero_of_several_models_is_their_untrimmed_merge():
    rule = Ties(strength=0.0, others=["another"])
    given = merge_input(rule)
    both = [given.delta, *given.others]
    assert torch.equal(rule.merged(given).values, merging.elect(both))


@pytest.mark.parametrize("others", [[], ["another"], ["another", "a third"]])
def test_the_published_density_is_strength_four(others):
    rule = Ties(strength=4.0, others=others)
    given = merge_input(rule)
    expected = oracles.ties([given.delta, *given.others], 0.2)
    torch.testing.assert_close(rule.merged(given).values.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ties(others="folder"), r"Ties: others='folder' is no list"),
        (lambda: Ties(others=[3]), r"Ties: others\[0\]=3 is no model"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
