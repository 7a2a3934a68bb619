from dataclasses import replace

import pytest
import torch

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import ModelStock
from tests.fixtures import merging as oracles
from tests.fixtures.problems import merge_input


def test_strength_zero_of_several_models_is_their_mean():
    rule = ModelStock(strength=0.0, others=["another"])
    given = merge_input(rule)
    torch.testing.assert_close(rule.merged(given).values, sum([given.delta, *given.others]) / 2)


@pytest.mark.parametrize("count", [1, 3])
def test_strength_one_is_the_published_ratio_of_the_mean_and_the_note_tells_it(count):
    rule = ModelStock(strength=1.0, others=["another"] * count)
    given = merge_input(rule)
    common = torch.ones_like(given.delta)  # so that the deltas are alike
    deltas = [3 * common + delta for delta in (given.delta, *given.others)]
    values, (note,) = rule.merged(replace(given, delta=deltas[0], others=tuple(deltas[1:])))
    ratio = oracles.published_stock_ratio(deltas)
    torch.testing.assert_close(values.double(), ratio * torch.stack(deltas).double().mean(0), rtol=1e-4, atol=1e-5)
    assert f"of {count + 1} deltas" in note and note.endswith(f"ratio {ratio:.3f}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelStock(), r"ModelStock: others=\(\); it needs at least one more model"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
