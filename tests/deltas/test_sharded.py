"""Slices of a delta, each adjusted by the process that has it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.dense import DenseDelta, as_strided
from safedelta_hf.deltas.sharded import ShardedDelta, own_view
from safedelta_hf.distributed.model import Shard
from safedelta_hf.records.uses import MatrixView, Role, Use
from tests.fixtures.problems import SHAPES_BY_ROLE
from tests.fixtures.threads import on_each

SHAPES = {
    Role.LINEAR: (5, 3),
    Role.CONV1D: (5, 3),
    Role.EMBEDDING: (5, 3),
    Role.SCALE: (5,),
    Role.BIAS: (5,),
    Role.OFFSET: (5, 2),
    Role.CONVOLUTION: (5, 2, 2),
}
CUTS = [(0, 5), (0, 2, 5), (0, 0, 4, 5)]
"""Where the slices of each process begin and end; one of them may have none."""


def on_shards(cuts, work):
    """What `work(shard, ranks)` gives on each process."""

    def run(ranks):
        shard = Shard(start=cuts[ranks.rank], stop=cuts[ranks.rank + 1], size=cuts[-1], group=object())
        return work(shard, ranks)

    return on_each(len(cuts) - 1, run)


def use_of(role, shape):
    return Use(parameter="w", role=role, moment="w", view=role.view(shape), shape=shape)


def transform_of(role, view):
    size = (view.columns,) if role.is_diagonal else (view.columns, view.columns)
    return Dense(matrix=torch.randn(size))


def pair(shape):
    return torch.randn(shape), torch.randn(shape)


def own(tuned, base, shard, ranks):
    rows = slice(shard.start, shard.stop)
    return ShardedDelta(DenseDelta(tuned[rows], base[rows]), tuned.shape, shard, ranks)


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("role", SHAPES)
def test_the_slices_of_all_processes_are_the_whole_delta(role, cuts):
    (tuned, base), use = pair(SHAPES[role]), use_of(role, SHAPES[role])
    whole, transform = DenseDelta(tuned, base), transform_of(role, use.view)
    changed = whole.transformed(use, transform)

    def work(shard, ranks):
        delta = own(tuned, base, shard, ranks)
        after = delta.transformed(use, transform)
        seen = delta.matrix(use)
        sums = [delta.tuned_energy, delta.lost_energy, after.lost_energy, seen.inner(transform), float(seen.rows)]
        return after.weight(), torch.tensor(sums), seen.column_energy(), seen.column_energy(transform)

    weights, sums, energies, transformed = zip(*on_shards(cuts, work), strict=True)
    torch.testing.assert_close(torch.cat(weights), changed.weight())
    seen = whole.matrix(use)
    expected = [whole.tuned_energy, 0.0, changed.lost_energy, seen.inner(transform), seen.rows]
    for rank in range(len(cuts) - 1):
        torch.testing.assert_close(sums[rank], torch.tensor(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(energies[rank], seen.column_energy())
        torch.testing.assert_close(transformed[rank], seen.column_energy(transform))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_is_changed_on_the_processes_that_have_it(transposed, cuts):
    shape = (5, 4, 3)
    tuned, base = pair(shape)
    view = MatrixView.contiguous(4, 3, start=2 * 12)
    view = view.transposed if transposed else view
    use = Use(parameter="w", role=Role.LINEAR, moment="w", view=view, shape=shape)
    transform = Dense(matrix=torch.randn(view.columns, view.columns))
    expected = DenseDelta(tuned, base).transformed(use, transform).weight()

    def work(shard, ranks):
        return own(tuned, base, shard, ranks).transformed(use, transform).weight()

    found = torch.cat(on_shards(cuts, work))
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 1, 3, 4]], tuned[[0, 1, 3, 4]])


def test_what_is_kept_whole_or_dropped_whole_is_bit_identical_and_the_tuned_delta_stays():
    tuned, base = pair((5, 3))
    use = use_of(Role.LINEAR, (5, 3))

    def work(shard, ranks):
        delta = own(tuned, base, shard, ranks)
        dropped = delta.zero()
        delta.transformed(use, Dense(matrix=torch.zeros(3)))
        energies = torch.tensor([dropped.lost_energy, delta.tuned_energy, delta.lost_energy])
        return delta.weight(), dropped.weight(), energies

    kept, dropped, energies = zip(*on_shards((0, 2, 5), work), strict=True)
    assert torch.equal(torch.cat(kept), tuned) and torch.equal(torch.cat(dropped), base)
    whole = float((tuned - base).double().square().sum())
    for found in energies:
        torch.testing.assert_close(found, torch.tensor([whole, whole, 0.0]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("role", list(Role))
@given(data=st.data())
def test_what_the_processes_have_of_a_matrix_is_the_matrix(role, data):
    shape = torch.Size(data.draw(SHAPES_BY_ROLE[role]))
    values = torch.arange(shape.numel()).reshape(shape)
    view = data.draw(st.sampled_from([role.view(shape), *parts_of(shape)]))
    matrix, found = as_strided(values, view), torch.full((view.rows, view.columns), -1)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=3))), shape[0]]
    use = Use(parameter="w", role=role, moment="w", view=view, shape=tuple(shape))
    shares = []
    for start, stop in itertools.pairwise(cuts):
        share = own_view(use, shape, Shard(start=start, stop=stop, size=shape[0]))
        shares.append(share)
        if share is not None:
            own_part, columns = share
            own = as_strided(values[start:stop].contiguous(), own_part)
            if own.numel():
                rows = [int((matrix[:, columns][:, 0] == first).nonzero()) for first in own[:, 0]]
                found[rows, columns] = own
    if any(share is None for share in shares):
        assert not role.is_diagonal and shares == [None] * len(shares)
        assert any(len({int(entry) // shape[1:].numel() for entry in row}) > 1 for row in matrix)
    else:
        assert torch.equal(found, matrix)


def parts_of(shape):
    """Slices along the first dimension, their transposes, and columns of the whole."""
    size = shape[1:].numel()
    slices = [MatrixView.contiguous(shape[1], size // shape[1], start=size * n) for n in range(shape[0]) if shape[1:]]
    columns = MatrixView(start=size - 1, rows=shape[0], columns=1, row_stride=size, column_stride=1)
    return [*slices, *(view.transposed for view in slices), columns, columns.transposed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("role", [Role.LINEAR, Role.CONV1D, Role.CONVOLUTION])
def test_slices_are_rounded_as_the_whole_is(role, cuts, dtype):
    use = use_of(role, SHAPES[role])
    tuned, base = (values.to(dtype) for values in pair(SHAPES[role]))
    size = use.view.columns
    factor = torch.linalg.cholesky(torch.eye(size) + torch.ones(size, size)).T.contiguous()
    change = Dense(matrix=torch.eye(size) / 3)

    def work(shard, ranks):
        delta = own(tuned, base, shard, ranks).transformed(use, change)
        return delta.rounded().weight(), delta.rounded_along([(use, factor)]).rounded().weight()

    nearest, fed = (torch.cat(weights) for weights in zip(*on_shards(cuts, work), strict=True))
    whole = DenseDelta(tuned, base).transformed(use, change)
    assert torch.equal(nearest, whole.rounded().weight()) and nearest.dtype == dtype
    assert torch.equal(fed, whole.rounded_along([(use, factor)]).rounded().weight())
    assert not torch.equal(fed, nearest)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_figures_of_a_delta_of_any_size_are_those_of_the_whole(scale):
    tuned, base = (scale * one for one in pair((5, 3)))
    use = use_of(Role.LINEAR, (5, 3))
    transform = transform_of(Role.LINEAR, use.view)
    whole = DenseDelta(tuned, base)

    def work(shard, ranks):
        delta = own(tuned, base, shard, ranks)
        return delta.tuned_energy, delta.matrix(use).inner(transform)

    for found in on_shards((0, 2, 5), work):
        assert found == pytest.approx((whole.tuned_energy, whole.matrix(use).inner(transform)), rel=1e-4, abs=0)
