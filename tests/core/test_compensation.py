import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.compensation import (
    CHUNK,
    SweepRatios,
    SweepResidual,
    joint_compensation,
    sequential_compensation,
)
from safedelta_hf.core.curvature import factorise
from safedelta_hf.core.transform import KeepColumns
from tests.fixtures import oracles
from tests.fixtures.problems import layer, layers


def some_columns(size: int, seed: int) -> torch.Tensor:
    kept = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept[0], kept[-1] = True, False
    return kept


def compensated(delta, hessian, seed, transform_of, damping=0.01):
    curvature = factorise(hessian, damping)
    kept = some_columns(delta.shape[1], seed)
    return curvature, kept, transform_of(curvature, kept)(delta)


@given(layers, st.integers(0, 100))
def test_sequential_equals_the_column_by_column_sweep(problem, seed):
    delta, hessian = problem
    curvature, kept, ours = compensated(delta, hessian, seed, sequential_compensation)
    slow = oracles.published_sweep(delta, kept.expand_as(delta), oracles.damped(hessian, 0.01))
    assert (ours - slow).norm() <= 1e-3 * (1 + slow.norm())


@given(layers, st.integers(0, 100))
def test_joint_equals_the_least_squares_optimum(problem, seed):
    delta, hessian = problem
    curvature, kept, ours = compensated(delta, hessian, seed, joint_compensation)
    best = oracles.best_compensation(delta, kept, oracles.damped(hessian, 0.01))
    assert oracles.loss(ours, curvature.hessian) <= oracles.loss(best, curvature.hessian) * (1 + 1e-3) + 1e-6


@given(layers, st.integers(0, 100))
def test_joint_never_leaves_more_loss_than_sequential(problem, seed):
    delta, hessian = problem
    curvature, _, joint = compensated(delta, hessian, seed, joint_compensation)
    _, _, sequential = compensated(delta, hessian, seed, sequential_compensation)
    assert oracles.loss(joint, curvature.hessian) <= oracles.loss(sequential, curvature.hessian) * (1 + 1e-4)


@given(layers, st.integers(0, 100))
def test_compensation_never_raises_the_loss_of_what_is_kept(problem, seed):
    delta, hessian = problem
    curvature, kept, joint = compensated(delta, hessian, seed, joint_compensation)
    bare = KeepColumns(kept=kept, response=None)(delta)
    assert oracles.loss(joint, curvature.hessian) <= oracles.loss(bare, curvature.hessian) * (1 + 1e-4)


@given(layers, st.integers(0, 100))
def test_kept_columns_are_bit_identical(problem, seed):
    delta, hessian = problem
    for transform_of in (joint_compensation, sequential_compensation):
        _, kept, ours = compensated(delta, hessian, seed, transform_of)
        assert torch.equal(ours[:, kept], delta[:, kept])


def residuals(delta, hessian, kept, start, stop, rows=1):
    """Of the whole delta, and of so few of its rows at a time."""
    residual = SweepResidual(ratios=SweepRatios(factorise(hessian, 0.01)), kept=kept, start=start, stop=stop)
    return residual(delta), torch.cat(list(map(residual, delta.split(rows))))


@given(st.integers(0, 10_000), st.sampled_from([0, 4, 12, 20]), st.floats(0.0, 1.0))
def test_few_rows_and_many_are_left_what_the_column_by_column_sweep_leaves(seed, start, share):
    delta, hessian = layer(seed, 40, 24, 60)
    kept = torch.rand(24, generator=torch.Generator().manual_seed(seed)) < share
    kept[start:] = False
    swept = oracles.published_sweep(delta, kept.expand_as(delta), oracles.damped(hessian, 0.01))
    slow = (delta.double() - swept)[:, start:]
    for found in residuals(delta, hessian, kept, start, 24):
        assert (found - slow).norm() <= 1e-3 * (1 + slow.norm())


@pytest.mark.parametrize("start", [CHUNK, 2 * CHUNK + 8])
def test_several_chunks_are_one_sweep(start):
    delta, hessian = layer(1, 600, 2 * CHUNK + 20, 2000)
    kept = torch.arange(delta.shape[1]) % 3 == 0
    kept[start:] = False
    many, few = residuals(delta, hessian, kept, start, start + 12, rows=50)
    torch.testing.assert_close(many, few, rtol=1e-3, atol=1e-3)
