import json
import math

import pytest
import torch
from torch import nn

from safedelta_hf.core import merging
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import RULES, Dare, MergeInput, MergeRule, ModelStock, SafeMerge, Scale, Slerp, Ties

OTHER = "another"
RULE_WITH = {
    "slerp": lambda strength: Slerp(strength=strength),
    "dare": lambda strength: Dare(strength=strength),
    "dare rescaled": lambda strength: Dare(strength=strength, rescale=True),
    "ties": lambda strength: Ties(strength=strength),
    "ties of two": lambda strength: Ties(strength=strength, others=[OTHER]),
    "model stock": lambda strength: ModelStock(strength=strength, others=[OTHER]),
    "safe merge": lambda strength: SafeMerge(strength=strength, threshold=1.0, unaligned="before", safe="safe"),
}


def parameter(rule, shape=(12, 9), seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    base, delta, *others = (torch.randn(shape, generator=generator) for _ in range(2 + len(rule.sources)))
    return MergeInput(name="layer.weight", base=base, delta=delta, others=tuple(others), **changes)


@pytest.mark.parametrize("name", ["slerp", "dare", "dare rescaled", "ties", "safe merge"])
def test_strength_zero_is_tuned_bit_for_bit(name):
    rule = RULE_WITH[name](0.0)
    given = parameter(rule)
    assert torch.equal(rule.merged(given).values, given.delta)


def test_strength_zero_of_several_models_is_their_untrimmed_merge():
    given = parameter(RULE_WITH["ties of two"](0.0))
    both = [given.delta, *given.others]
    assert torch.equal(RULE_WITH["ties of two"](0.0).merged(given).values, merging.elect(both))
    torch.testing.assert_close(RULE_WITH["model stock"](0.0).merged(given).values, sum(both) / 2)


@pytest.mark.parametrize("name", ["slerp", "dare", "ties", "ties of two", "model stock"])
def test_a_large_strength_is_the_base(name):
    rule = RULE_WITH[name](1e9)
    assert float(rule.merged(parameter(rule)).values.abs().max()) < 1e-5


def test_a_large_strength_is_the_safety_tuned_model_in_the_layers_that_are_merged():
    rule = RULE_WITH["safe merge"](1e9)
    given = parameter(rule)
    torch.testing.assert_close(rule.merged(given).values, given.others[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["slerp", "dare", "ties", "model stock"])
def test_more_strength_never_keeps_more(name):
    norms = []
    for strength in (0.0, 0.1, 0.5, 1.0, 3.0, 30.0):
        rule = RULE_WITH[name](strength)
        norms.append(float(rule.merged(parameter(rule, seed=3)).values.norm()))
    assert norms == sorted(norms, reverse=True) and norms[0] > norms[-1]


def test_slerp_of_a_small_delta_is_scale():
    rule = Slerp(strength=1.5)
    given = parameter(rule)
    small = MergeInput(name=given.name, base=given.base, delta=1e-3 * given.delta)
    torch.testing.assert_close(rule.merged(small).values, small.delta / 2.5)
    assert (Slerp.search_range, Slerp.mildest) == (Scale.search_range, Scale.mildest)


def test_what_is_dropped_depends_on_seed_and_name_alone():
    rule = Dare(strength=1.0)
    given = parameter(rule)
    kept = rule.merged(given).values
    assert torch.equal(kept, rule.merged(given).values) and torch.equal(kept, Dare(strength=1.0).merged(given).values)
    assert not torch.equal(kept, Dare(strength=1.0, seed=1).merged(given).values)
    elsewhere = MergeInput(name="other.weight", base=given.base, delta=given.delta)
    assert not torch.equal(kept, rule.merged(elsewhere).values)


def test_a_rescaled_drop_leaves_larger_entries_at_the_same_places():
    given = parameter(Dare())
    plain, rescaled = Dare(strength=3.0).merged(given).values, Dare(strength=3.0, rescale=True).merged(given).values
    assert 0.1 < float((plain != 0).float().mean()) < 0.4
    torch.testing.assert_close(rescaled, 4 * plain)


def layer_of(cosine_is_high: bool):
    alignment = torch.cat([torch.eye(6)[:, :2], torch.zeros(6, 2)], 1)
    inside = alignment @ torch.randn(4, 4)
    outside = torch.cat([torch.zeros(2, 4), torch.randn(4, 4)])
    delta = inside + 0.1 * outside if cosine_is_high else 0.1 * inside + outside
    return delta, alignment, torch.randn(6, 4)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_safe_merge_merges_the_layers_below_the_threshold(aligned, transposed):
    delta, alignment, safe = layer_of(aligned)
    stored = [tensor.T.contiguous() if transposed else tensor for tensor in (delta, -alignment, safe)]
    given = MergeInput(
        name="w", base=torch.zeros_like(stored[0]), delta=stored[0], others=tuple(stored[1:]), is_transposed=transposed
    )
    values, (note,) = SafeMerge(strength=0.25, unaligned="u", safe="s").merged(given)
    if aligned:
        assert torch.equal(values, stored[0]) and "left as tuned" in note
    else:
        torch.testing.assert_close(values, 0.8 * stored[0] + 0.2 * stored[2])
        assert "merged with the safety-tuned model" in note


def test_matrices_are_laid_out_with_outputs_first():
    def laid_out(shape, **changes):
        return tuple(
            MergeInput(name="", base=torch.zeros(0), delta=torch.zeros(0), **changes).matrices(torch.zeros(shape)).shape
        )

    assert laid_out((5,)) == (5, 1)
    assert laid_out((5, 3)) == (5, 3) and laid_out((5, 3), is_transposed=True) == (3, 5)
    assert laid_out((5, 3, 2)) == (5, 6)
    assert laid_out((4, 5, 3), is_stack=True) == (4, 5, 3)
    assert laid_out((4, 5, 3), is_stack=True, is_transposed=True) == (4, 3, 5)


class Reader:
    source = "somewhere"

    def read(self, name):
        return torch.zeros(1)


def test_settings_are_plain_values_with_models_by_name():
    rule = Ties(strength="auto", others=["folder", nn.Linear(2, 2), Reader()])
    assert json.loads(json.dumps(rule.settings)) == rule.settings
    assert rule.settings["others"] == ["folder", "a Linear in memory", "somewhere"]
    assert rule.settings["strength"]["tolerance"] > 0
    named = SafeMerge(strength=1.0, unaligned="before", safe="after")
    assert named.settings == {"strength": 1.0, "threshold": 0.35, "unaligned": "before", "safe": "after"}
    assert named.at(2.0).settings["safe"] == "after"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelStock(), r"ModelStock: others=\(\); it needs at least one more model"),
        (lambda: SafeMerge(), r"SafeMerge: unaligned=None is no model.*needs the model before its alignment"),
        (lambda: SafeMerge(unaligned="folder"), r"SafeMerge: safe=None is no model"),
        (lambda: Ties(others="folder"), r"Ties: others='folder' is no list"),
        (lambda: Ties(others=[3]), r"Ties: others\[0\]=3 is no model"),
        (lambda: Slerp(strength=-1.0), "Slerp: strength=-1.0"),
        (lambda: Slerp(strength=math.inf), "Slerp: strength=inf"),
        (lambda: Dare(rescale=1), "Dare: rescale=1"),
        (lambda: Dare(seed=0.5), "Dare: seed=0.5"),
        (lambda: SafeMerge(unaligned="u", safe="s", threshold=1.2), "SafeMerge: threshold=1.2"),
    ],
)
def test_what_a_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_merges_are_registered_and_say_what_they_accept():
    merges = {name for name, rule in RULES.items() if issubclass(rule, MergeRule)}
    assert merges == {"slerp", "dare", "ties", "model_stock", "safe_merge"}
    for name, rule in RULES.items():
        assert rule.needs_dense == (name in merges), name
