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


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("weight", [0.2, 0.4, 0.6, 0.8])  # the grid of Farn et al.
def test_with_a_density_the_strength_is_a_weight_on_what_is_kept_at_any_strength(weight, rescale):
    given = merge_input(Dare())
    kept = Dare(strength=0.0, density=0.3).merged(given).values != 0
    found = Dare(strength=1 / weight - 1, density=0.3, rescale=rescale).merged(given).values
    expected = torch.zeros_like(found, dtype=torch.float64)
    for place in kept.nonzero().tolist():  # base + l * (entry / (1 - p)), entry by entry
        entry = float(given.delta[tuple(place)])
        expected[tuple(place)] = weight * (entry / 0.3 if rescale else entry)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert 0.15 < float(kept.float().mean()) < 0.45


def test_a_whole_density_is_linear_merging():
    given = merge_input(Dare())
    assert torch.equal(Dare(strength=1.0, density=1.0, rescale=True).merged(given).values, given.delta / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dare(rescale=1), "Dare: rescale=1"),
        (lambda: Dare(density=0.0), "Dare: density=0.0 must be a number above 0 and at most 1"),
        (lambda: Dare(density="half"), "Dare: density='half'"),
        (lambda: Dare(seed=0.5), "Dare: seed=0.5"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
