import pytest
import torch

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import Dare, MergeInput
from tests.fixtures.problems import merge_input


def test_what_is_dropped_depends_on_seed_and_name_alone():
    rule = Dare(strength=1.0)
    given = merge_input(rule)
    kept = rule.merged(given).values
    assert torch.equal(kept, rule.merged(given).values) and torch.equal(kept, Dare(strength=1.0).merged(given).values)
    assert not torch.equal(kept, Dare(strength=1.0, seed=1).merged(given).values)
    elsewhere = MergeInput(name="other.weight", base=given.base, delta=given.delta)
    assert not torch.equal(kept, rule.merged(elsewhere).values)


def test_a_rescaled_drop_leaves_larger_entries_at_the_same_places():
    given = merge_input(Dare())
    plain, rescaled = Dare(strength=3.0).merged(given).values, Dare(strength=3.0, rescale=True).merged(given).values
    assert 0.1 < float((plain != 0).float().mean()) < 0.4
    torch.testing.assert_close(rescaled, 4 * plain)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dare(rescale=1), "Dare: rescale=1"),
        (lambda: Dare(seed=0.5), "Dare: seed=0.5"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
