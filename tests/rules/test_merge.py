import json

import pytest
import torch
from torch import nn

from safedelta_hf.rules import RULES, Dare, MergeInput, MergeRule, ModelStock, SafeMerge, Slerp, Ties
from tests.fixtures.problems import merge_input

OTHER = "another"
RULE_WITH = {
    "slerp": lambda strength: Slerp(strength=strength),
    "dare": lambda strength: Dare(strength=strength),
    "dare rescaled": lambda strength: Dare(strength=strength, rescale=True),
    "dare of a density": lambda strength: Dare(strength=strength, density=0.4),
    "ties": lambda strength: Ties(strength=strength),
    "ties of two": lambda strength: Ties(strength=strength, others=[OTHER]),
    "model stock": lambda strength: ModelStock(strength=strength, others=[OTHER]),
    "safe merge": lambda strength: SafeMerge(strength=strength, threshold=1.0, unaligned="before", safe="safe"),
}


@pytest.mark.parametrize("name", ["slerp", "dare", "dare rescaled", "ties", "safe merge"])
def test_strength_zero_is_tuned_bit_for_bit(name):
    rule = RULE_WITH[name](0.0)
    given = merge_input(rule)
    assert torch.equal(rule.merged(given).values, given.delta)


@pytest.mark.parametrize("name", ["slerp", "dare", "dare of a density", "ties", "ties of two", "model stock"])
def test_a_large_strength_is_the_base(name):
    rule = RULE_WITH[name](1e9)
    left = rule.merged(merge_input(rule)).values
    # Of each model TIES keeps one entry at any strength.
    assert int((left.abs() >= 1e-5).count_nonzero()) == (1 + len(rule.sources) if "ties" in name else 0)


@pytest.mark.parametrize("name", ["slerp", "dare", "dare of a density", "ties", "model stock"])
def test_more_strength_never_keeps_more(name):
    norms = []
    for strength in (0.0, 0.1, 0.5, 1.0, 3.0, 30.0):
        rule = RULE_WITH[name](strength)
        norms.append(float(rule.merged(merge_input(rule, seed=3)).values.norm()))
    assert norms == sorted(norms, reverse=True) and norms[0] > norms[-1]


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
    assert rule.settings["strength"]["confidence"] > 0
    named = SafeMerge(strength=1.0, unaligned="before", safe="after")
    switches = {"relative": False, "vectors": False}
    assert named.settings == {"strength": 1.0, "threshold": 0.35, **switches, "unaligned": "before", "safe": "after"}
    assert named.at(2.0).settings["safe"] == "after"


def test_merges_are_registered_and_say_what_they_accept():
    merges = {name for name, rule in RULES.items() if issubclass(rule, MergeRule)}
    assert merges == {"slerp", "dare", "ties", "model_stock", "safe_merge", "safe_patch"}
    for name, rule in RULES.items():
        assert rule.needs_dense == (name in merges), name
