import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.curvature import factorise
from safedelta_hf.core.selection import budget, keepable, select_blockwise, select_columns
from tests.fixtures import oracles
from tests.fixtures.problems import layers

strengths = st.floats(0.0, 1e4)


def selected(delta, hessian, strength, exclude_top=0.15, block=2048):
    curvature = factorise(hessian, 0.01)
    return select_blockwise(
        curvature,
        lambda transform: transform(delta).square().sum(0),
        rows=len(delta),
        strength=strength,
        exclude_top=exclude_top,
        block=block,
    )


@given(layers, strengths)
def test_entries_equal_the_greedy_choice_entry_by_entry(problem, strength):
    delta, hessian = problem
    pivots = factorise(hessian, 0.01).pivots
    limit = budget(pivots, strength, len(delta))
    slow = oracles.greedy_entries(delta, pivots, limit)
    assert abs(int(oracles.published_entries(pivots, delta, limit, 0.0).sum()) - len(slow)) <= 1


@given(layers, strengths, st.sampled_from([0.0, 0.15, 0.5]))
def test_columns_are_the_entries_without_the_column_that_is_cut(problem, strength, exclude_top):
    delta, hessian = problem
    pivots = factorise(hessian, 0.01).pivots
    limit = budget(pivots, strength, len(delta)) * 0.999
    entries = oracles.published_entries(pivots, delta, limit, exclude_top)
    columns = select_columns(pivots, delta.square().sum(0), limit, exclude_top)
    assert (entries.any(0) & ~entries.all(0)).sum() <= 1
    assert not (columns & ~entries.all(0)).any()
    assert (columns ^ entries.all(0)).sum() <= 1


@given(layers, strengths)
def test_the_budget_is_never_exceeded(problem, strength):
    delta, hessian = problem
    pivots = factorise(hessian, 0.01).pivots
    kept = selected(delta, hessian, strength)
    spent = float((delta.square().sum(0) * pivots)[kept].sum())
    assert spent <= budget(pivots, strength, len(delta)) * (1 + 1e-5)


@given(layers)
def test_no_budget_keeps_nothing_and_infinite_budget_everything(problem):
    delta, hessian = problem
    assert not selected(delta, hessian, 0.0).any()
    assert selected(delta, hessian, math.inf, exclude_top=0.0).all()


@given(layers, st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_more_strength_keeps_a_superset_within_one_block(problem, one, other):
    delta, hessian = problem
    fewer, more = (selected(delta, hessian, strength) for strength in sorted((one, other)))
    assert not (fewer & ~more).any()


@given(layers)
def test_the_excluded_share_is_never_kept(problem):
    delta, hessian = problem
    pivots = factorise(hessian, 0.01).pivots
    kept = selected(delta, hessian, math.inf, exclude_top=0.15)
    assert int(kept.sum()) == keepable(len(pivots), 0.15)
    assert not kept.all() and pivots[~kept].min() >= pivots[kept].max() if kept.any() else True


@pytest.mark.parametrize(("size", "share", "left"), [(20, 0.15, 17), (64, 0.15, 54), (7, 0.0, 7), (7, 1.0, 0)])
def test_excluded_columns_are_rounded_up(size, share, left):
    assert keepable(size, share) == left


def test_later_blocks_cost_what_the_sweep_has_left_of_them():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(200, 24, generator=generator) @ (torch.randn(24, 24, generator=generator) + 0.5)
    delta, hessian = torch.randn(5, 24, generator=generator), inputs.T @ inputs
    strength, block = 4000.0, 8
    kept = selected(delta, hessian, strength, exclude_top=0.0, block=block)
    damped = oracles.damped(hessian, 0.01)
    pivots = 1 / oracles.upper_factor_of_inverse(damped).diagonal().square()
    expected = torch.zeros(24, dtype=torch.bool)
    for start in range(0, 24, block):
        columns = slice(start, start + block)
        swept = oracles.published_sweep(delta, expected.expand_as(delta), damped)
        energy = (delta.double() - swept)[:, columns].square().sum(0)
        limit = float(pivots[columns].mean()) * strength / 2 * 5 / 4096
        spent = 0.0
        for m in torch.argsort(pivots[columns]):
            spent += float(energy[m] * pivots[columns][m])
            if spent > limit:
                break
            expected[start + m] = True
    assert torch.equal(kept, expected)
    assert 0 < kept[:8].sum() < 8 and 0 < kept[8:].sum() < 16
