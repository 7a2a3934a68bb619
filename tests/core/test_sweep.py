import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.compensation import CHUNK, SweepRatios, SweepResidual
from safedelta_hf.core.curvature import factorise
from tests.fixtures import oracles
from tests.fixtures.problems import layer


def residuals(delta, hessian, kept, start, stop):
    """Of the whole delta, and of its rows one at a time."""
    residual = SweepResidual(ratios=SweepRatios(factorise(hessian, 0.01)), kept=kept, start=start, stop=stop)
    return residual(delta), torch.cat([residual(row[None]) for row in delta])


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
    many, few = residuals(delta, hessian, kept, start, start + 12)
    torch.testing.assert_close(many, few, rtol=1e-3, atol=1e-3)
