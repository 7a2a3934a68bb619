import json

import pytest
import torch

from safedelta_hf import SafePatch
from safedelta_hf.errors import ConfigurationError, MergeError, NumericalError
from safedelta_hf.rules import Gradients
from tests.fixtures.problems import merge_input

NAME, SHAPE = "layer.weight", (12, 9)


def gradients(seed):
    return Gradients({NAME: torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))}, f"seed {seed}")


SETTINGS = {
    "strength": 1.0,
    "forget": "forget",
    "loosen": "loosen",
    "forget_gradients": gradients(1),
    "loosen_gradients": gradients(2),
    "keep_forget": 0.3,
    "keep_loosen": 0.2,
    "retention": 0.6,
    "rescale": False,
    "seed": 0,
}


def patched(**changes):
    """The patch alone, what it was made of, and what the report says."""
    rule = SafePatch(**SETTINGS | changes)
    given = merge_input(rule)
    values, (note,) = rule.merged(given)
    return values - given.delta, given, note


def by_hand(given, keep_forget, keep_loosen):
    """Nothing thinned: entry by entry, the highest scores of each patch, and what one of them has alone."""
    sets = []
    for patch, keep, seed in zip(given.others, (keep_forget, keep_loosen), (1, 2), strict=True):
        gradient = gradients(seed).values[NAME].double().flatten().tolist()
        weights = (given.base + patch).double().flatten().tolist()
        ranked = sorted(range(len(weights)), key=lambda n, w=weights, g=gradient: -abs(w[n] * g[n]))
        sets.append(set(ranked[: int(keep * len(weights))]))
    patches = [patch.double().flatten().tolist() for patch in given.others]
    found = [0.0] * len(patches[0])
    for place in sets[0] - sets[1]:
        found[place] = patches[0][place]
    for place in sets[1] - sets[0]:
        found[place] = patches[1][place]
    return torch.tensor(found, dtype=torch.float64).reshape(SHAPE)


@pytest.mark.parametrize(("keep_forget", "keep_loosen"), [(0.3, 0.2), (0.5, 0.5), (0.4, 0.0), (1.0, 1.0), (1.0, 0.5)])
def test_unthinned_it_is_the_difference_of_the_two_highest_sets_entry_by_entry(keep_forget, keep_loosen):
    patch, given, _ = patched(retention=1.0, keep_forget=keep_forget, keep_loosen=keep_loosen)
    torch.testing.assert_close(patch.double(), by_hand(given, keep_forget, keep_loosen), rtol=1e-4, atol=1e-5)
    if keep_forget == keep_loosen == 1.0:
        assert not patch.any()


def places(**changes):
    patch, given, _ = patched(**changes)
    of_forget, of_loosen = ((patch - one).abs() < 1e-5 for one in given.others)
    changed = patch.abs() > 1e-6
    assert not (changed & ~of_forget & ~of_loosen).any()  # no entry has a bit of both
    return changed & of_forget, changed & of_loosen


def test_the_two_parts_are_disjoint_and_of_the_stated_size():
    harm, refusals = places()
    assert not (harm & refusals).any()
    assert int(harm.sum()) <= int(0.3 * harm.numel()) and int(refusals.sum()) <= int(0.2 * harm.numel())
    assert int(places(keep_loosen=0.0)[0].sum()) == int(0.3 * harm.numel())


def test_what_is_retained_is_a_share_of_each_patch_by_itself_nested_in_what_is_kept():
    small, large = places(keep_forget=0.1, keep_loosen=0.0)[0], places(keep_forget=0.4, keep_loosen=0.0)[0]
    assert not (small & ~large).any() and small.sum() < large.sum()
    assert not torch.equal(large, places(keep_forget=0.4, keep_loosen=0.0, seed=1)[0])
    everything = places(keep_forget=0.6, keep_loosen=0.0)[0], places(keep_forget=0.0, keep_loosen=0.6)[1]
    assert all(0.45 < float(mask.float().mean()) <= 0.6 for mask in everything)
    assert not torch.equal(*everything)


def test_strength_is_a_factor_on_the_patch_and_rescaling_one_over_the_retained_share():
    once, given, _ = patched(keep_loosen=0.0)
    torch.testing.assert_close(patched(keep_loosen=0.0, strength=0.5)[0], once / 2, rtol=1e-4, atol=1e-6)
    rule = SafePatch(**SETTINGS | {"strength": 0.0})
    assert torch.equal(rule.merged(given).values, given.delta)
    whole = patched(keep_forget=0.6, keep_loosen=0.0)[0]
    larger = patched(keep_forget=0.6, keep_loosen=0.0, rescale=True)[0]
    same = (whole != 0) & (larger != 0)
    torch.testing.assert_close(larger[same], whole[same] / 0.6, rtol=1e-3, atol=1e-5)


def test_the_report_says_how_many_entries_each_patch_got_and_settings_are_plain():
    _, _, note = patched(retention=1.0, keep_forget=1.0, keep_loosen=0.5)
    assert note == "patched 54 entries to forget and 0 to loosen, 54 claimed by both"
    settings = SafePatch(**SETTINGS).settings
    assert json.loads(json.dumps(settings)) == settings and settings["forget_gradients"] == "seed 1"


def test_entries_that_the_loss_does_not_depend_on_are_not_patched_and_wrong_gradients_are_named():
    few = torch.zeros(SHAPE)
    few[0, :4] = 1.0
    harm, _ = places(forget_gradients=Gradients({NAME: few}), keep_loosen=0.0, retention=1.0)
    assert harm.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    with pytest.raises(MergeError, match=r"layer.weight: none in gradients in memory; give zeros where"):
        patched(forget_gradients=Gradients({}))
    with pytest.raises(MergeError, match=r"layer.weight: \[3, 2\] in gradients in memory, \[12, 9\] in the base"):
        patched(forget_gradients=Gradients({NAME: torch.ones(3, 2)}))
    with pytest.raises(NumericalError, match="layer.weight: holds NaN or Inf in gradients in memory"):
        patched(loosen_gradients=Gradients({NAME: torch.full(SHAPE, torch.nan)}))


@pytest.mark.parametrize("field", sorted(set(SETTINGS) - {"strength"}))
def test_every_constant_has_to_be_given(field):
    given = {name: value for name, value in SETTINGS.items() if name != field}
    with pytest.raises(ConfigurationError, match=rf"SafePatch: .*{field}=None"):
        SafePatch(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retention": 0.0}, "retention=0.0 must be a number above 0 and at most 1"),
        ({"keep_forget": 0.7}, r"keep_forget=0.7 must be a number in \[0, retention=0.6\]"),
        ({"keep_loosen": -0.1}, "keep_loosen=-0.1"),
        ({"seed": 0.5}, "seed=0.5 an integer"),
        ({"rescale": 1}, "rescale=1 must be True or False"),
        ({"forget_gradients": {}}, "forget_gradients={} has no gradients"),
    ],
)
def test_what_the_rule_cannot_use_is_a_named_error(change, message):
    with pytest.raises(ConfigurationError, match=message):
        SafePatch(**SETTINGS | change)
