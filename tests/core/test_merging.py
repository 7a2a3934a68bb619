import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core import merging
from tests.fixtures import merging as oracles

shares = st.floats(0.0, 1.0)
seeds = st.integers(0, 10_000)
shapes = st.sampled_from([(7,), (5, 4), (3, 8), (2, 3, 5)])


def drawn(shape, seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@given(shapes, seeds, shares)
def test_slerp_equals_the_arc_of_the_weights(shape, seed, share):
    base, tuned = drawn(shape, seed, 2)
    found = base + merging.slerp(base, tuned - base, share)
    torch.testing.assert_close(found.double(), oracles.slerp(base, tuned, share), rtol=1e-4, atol=1e-4)


@given(seeds, shares)
def test_slerp_keeps_the_norm_of_weights_of_one_norm(seed, share):
    base, tuned = drawn((6, 4), seed, 2)
    tuned = tuned * (base.norm() / tuned.norm())
    found = base + merging.slerp(base, tuned - base, share)
    assert float(found.norm()) == pytest.approx(float(base.norm()), rel=1e-4)


@given(shapes, seeds)
def test_slerp_ends_at_both_weights(shape, seed):
    base, tuned = drawn(shape, seed, 2)
    assert torch.equal(merging.slerp(base, tuned - base, 1.0), tuned - base)
    assert merging.slerp(base, tuned - base, 0.0).abs().max() < 1e-6


def test_the_switch_to_a_straight_line_is_not_felt():
    base, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for alike in (merging.COLLINEAR - 1e-5, merging.COLLINEAR + 1e-5):
        tuned = alike * base + math.sqrt(1 - alike**2) * across
        found = base + merging.slerp(base, tuned - base, 0.3)
        torch.testing.assert_close(found.double(), oracles.slerp(base, tuned, 0.3), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("base", "tuned"),
    [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [3.0, 6.0]), ([1.0, 2.0], [-1.0, -2.0])],
)
def test_slerp_is_linear_where_there_is_no_arc(base, tuned):
    base, tuned = torch.tensor(base), torch.tensor(tuned)
    torch.testing.assert_close(merging.slerp(base, tuned - base, 0.25), 0.25 * (tuned - base))


def test_slerp_of_orthogonal_weights_is_an_arc():
    base, tuned = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    half = base + merging.slerp(base, tuned - base, 0.5)
    torch.testing.assert_close(half, torch.tensor([1.0, 1.0]) / math.sqrt(2))


@given(seeds, shares, shares)
def test_a_larger_share_chooses_all_that_a_smaller_one_does(seed, one, other):
    smaller, larger = (merging.random_entries((40, 30), share, seed) for share in sorted((one, other)))
    assert not (smaller & ~larger).any()
    assert float(larger.float().mean()) == pytest.approx(max(one, other), abs=0.08)


@pytest.mark.parametrize("rescale", [False, True])
def test_the_expectation_of_dropping_is_the_delta_with_rescaling_and_its_share_without(rescale):
    delta, share, total = torch.randn(6, 5), 0.3, torch.zeros(6, 5, dtype=torch.float64)
    rounds = 4000
    for seed in range(rounds):
        total += merging.drop(delta, merging.random_entries((6, 5), share, seed), share, rescale=rescale)
    expected = delta.double() * (1.0 if rescale else share)
    error = (total / rounds - expected).abs() / delta.double().abs()
    deviation = math.sqrt(share * (1 - share) / rounds) / (share if rescale else 1)
    assert float(error.max()) < 4.5 * deviation


@given(shapes, seeds, st.integers(1, 4), shares)
def test_trim_elect_and_mean_equal_the_paper_entry_by_entry(shape, seed, count, density):
    deltas = [delta.mul(4).round() / 4 for delta in drawn(shape, seed, count)]  # with equal magnitudes, and zeros
    found = merging.elect([merging.trim(delta, density) for delta in deltas])
    torch.testing.assert_close(found.double(), oracles.ties(deltas, density), rtol=1e-5, atol=1e-6)


@given(shapes, seeds, st.floats(1e-9, 1.0))
def test_trimming_keeps_exactly_the_stated_number_of_entries_and_at_least_one(shape, seed, density):
    delta = drawn(shape, seed)[0].mul(2).round().add(0.25)  # few magnitudes, no zero
    assert int(merging.trim(delta, density).count_nonzero()) == max(1, int(density * delta.numel()))


@given(shapes, seeds)
def test_one_delta_elects_itself(shape, seed):
    (delta,) = drawn(shape, seed)
    assert torch.equal(merging.elect([merging.trim(delta, 1.0)]), delta)
    assert not merging.trim(delta, 0.0).any()


@given(shapes, seeds, st.sampled_from([2, 3, 5]))
def test_strength_one_is_the_published_ratio(shape, seed, count):
    common, *own = drawn(shape, seed, count + 1)
    deltas = [2 * common + one for one in own]
    alike = merging.mean_cosine(deltas)
    if alike > 0:
        assert merging.stock_ratio(alike, count, 1.0) == pytest.approx(oracles.published_stock_ratio(deltas), rel=1e-4)


def test_the_ratio_falls_with_strength_from_the_mean_to_the_base():
    ratios = [merging.stock_ratio(0.4, 3, strength) for strength in (0.0, 0.1, 1.0, 10.0, 1e9)]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] == 1 and ratios[-1] < 1e-8
    assert merging.stock_ratio(-0.2, 3, 0.5) == 0 and merging.stock_ratio(1.0, 3, 100.0) == 1


def test_the_ratio_is_the_point_between_base_and_mean_that_is_nearest_to_the_centre():
    # Two deltas of one norm and angle around a centre: the paper's perpendicular foot from the centre onto the line.
    centre, spread = torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.eye(4)[1:]
    deltas = [centre + 1.5 * direction for direction in spread]
    mean = torch.stack(deltas[:2]).mean(0)
    best = float(centre @ mean / (mean @ mean))
    assert merging.stock_ratio(merging.mean_cosine(deltas[:2]), 2, 1.0) == pytest.approx(best, rel=1e-6)


@given(seeds, st.sampled_from([(6, 4), (4, 9), (5, 1)]))
def test_the_alignment_cosine_is_that_of_the_delta_and_its_projection(seed, shape):
    delta, alignment = drawn(shape, seed, 2)
    expected = oracles.alignment_cosine(delta, alignment)
    assert merging.alignment_cosine(delta, alignment) == pytest.approx(expected, abs=1e-5)
    assert merging.alignment_cosine(delta, 7 * alignment) == pytest.approx(expected, abs=1e-5)


def test_the_alignment_cosine_of_a_stack_is_that_of_all_its_images_together():
    delta, alignment = drawn((3, 5, 4), 1, 2)
    images = torch.stack([(v @ v.T @ d) for d, v in zip(delta, alignment, strict=True)])
    assert merging.alignment_cosine(delta, alignment) == pytest.approx(oracles.cosine(delta, images), abs=1e-6)


def test_the_alignment_cosine_is_one_within_an_orthonormal_subspace_and_zero_outside():
    subspace = torch.eye(6)[:, :3]
    inside = subspace @ torch.randn(3, 4)
    outside = torch.eye(6)[:, 3:] @ torch.randn(3, 4)
    assert merging.alignment_cosine(inside, torch.cat([subspace, torch.zeros(6, 1)], 1)) == pytest.approx(1)
    assert merging.alignment_cosine(outside, torch.cat([subspace, torch.zeros(6, 1)], 1)) == 0
    assert merging.alignment_cosine(inside, torch.zeros(6, 4)) == 0


@pytest.mark.parametrize("shape", [(40, 40), (12, 48), (48, 12), (3, 20, 15)])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_chance_value_is_that_of_random_deltas(shape, rank):
    generator = torch.Generator().manual_seed(3)
    alignment = torch.randn(shape, generator=generator)
    if rank is not None:
        alignment = alignment[..., :rank] @ torch.randn((*shape[:-2], rank, shape[-1]), generator=generator)
    found = merging.chance_cosine(alignment)
    assert found == pytest.approx(oracles.chance_cosine(alignment), rel=0.02)
    assert merging.chance_cosine(5 * alignment) == pytest.approx(found, rel=1e-5)
    if rank is None:
        assert found == pytest.approx(1 / math.sqrt(1 + shape[-2] / shape[-1]), rel=0.05)


def test_chance_is_one_where_all_directions_weigh_alike_and_zero_without_an_alignment():
    assert merging.chance_cosine(torch.eye(5)) == pytest.approx(1.0)
    subspace = torch.cat([torch.eye(8)[:, :2], torch.zeros(8, 3)], 1)
    assert merging.chance_cosine(subspace) == pytest.approx(math.sqrt(2 / 8))
    assert merging.chance_cosine(torch.zeros(4, 3)) == 0
