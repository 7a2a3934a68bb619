import pytest
import torch

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules import MergeInput, SafeMerge
from tests.fixtures.problems import merge_input


def test_a_large_strength_is_the_safety_tuned_model_in_the_layers_that_are_merged():
    rule = SafeMerge(strength=1e9, threshold=1.0, unaligned="before", safe="safe")
    given = merge_input(rule)
    torch.testing.assert_close(rule.merged(given).values, given.others[1], rtol=1e-5, atol=1e-6)


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


def note_of(delta, alignment, **settings):
    given = MergeInput(
        name="w", base=torch.zeros_like(delta), delta=delta, others=(-alignment, torch.randn_like(delta))
    )
    values, (note,) = SafeMerge(strength=0.25, unaligned="u", safe="s", **settings).merged(given)
    assert torch.equal(values, delta) == ("left as tuned" in note)
    return note


def test_a_random_delta_of_a_square_layer_passes_the_published_threshold_and_not_one_measured_from_chance():
    torch.manual_seed(0)
    delta, alignment = torch.randn(2, 64, 64)
    assert "by chance 0.7" in note_of(delta, alignment) and "left as tuned" in note_of(delta, alignment)
    assert "merged with" in note_of(delta, alignment, relative=True)
    inside = alignment @ alignment.T @ alignment
    assert "left as tuned" in note_of(inside, alignment, relative=True)


@pytest.mark.parametrize("shape", [(64,), (64, 1)])
def test_parameters_of_one_column_are_not_merged_by_chance(shape):
    torch.manual_seed(0)
    delta, alignment = torch.randn(2, *shape)
    assert "of one column and left as tuned" in note_of(delta, alignment)
    assert "merged with" in note_of(delta, alignment, vectors=True)
    assert "cosine with the alignment subspace 1.000" in note_of(3 * alignment, alignment, vectors=True)


def test_where_every_direction_is_the_alignments_nothing_is_merged_for_leaving_it():
    assert "left as tuned" in note_of(torch.randn(1, 8), torch.randn(1, 8), relative=True)
    assert "left as tuned" in note_of(torch.randn(8, 8), torch.eye(8), relative=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SafeMerge(), r"SafeMerge: unaligned=None is no model.*needs the model before its alignment"),
        (lambda: SafeMerge(unaligned="folder"), r"SafeMerge: safe=None is no model"),
        (lambda: SafeMerge(unaligned="u", safe="s", relative=1), "SafeMerge: relative=1 must be True or False"),
        (lambda: SafeMerge(unaligned="u", safe="s", vectors="no"), "SafeMerge: vectors='no' must be True or False"),
        (lambda: SafeMerge(unaligned="u", safe="s", threshold=1.2), "SafeMerge: threshold=1.2"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
