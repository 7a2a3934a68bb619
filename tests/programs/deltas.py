"""Every layout of a delta, held in slices or by all ranks, against the whole delta; run under torchrun."""

import itertools

import torch
import torch.distributed as dist

from safedelta_hf.core.curvature import factorise
from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas import replicated
from safedelta_hf.deltas.dense import DenseDelta
from safedelta_hf.deltas.replicated import ReplicatedDelta
from safedelta_hf.deltas.sharded import ShardedDelta
from safedelta_hf.distributed.model import Shard
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.records.uses import MatrixView, Role, Use
from safedelta_hf.rules import Ridge, SafeDelta
from safedelta_hf.rules.rule import LayerMoments
from safedelta_hf.weights.digest import digest, digest_of_shard
from tests.programs.leaving import leave_together

CASES = {
    "linear": ((7, 5), Role.LINEAR, None),
    "head": ((3, 4), Role.HEAD, None),
    "fewer rows than ranks": ((1, 6), Role.LINEAR, None),
    "conv1d": ((6, 5), Role.CONV1D, None),
    "embedding": ((9, 4), Role.EMBEDDING, None),
    "norm": ((7,), Role.SCALE, None),
    "table": ((5, 3), Role.OFFSET, None),
    "bias": ((8,), Role.BIAS, None),
    "convolution": ((5, 2, 3), Role.CONVOLUTION, None),
    "second expert": ((3, 4, 5), Role.LINEAR, MatrixView(start=20, rows=4, columns=5, row_stride=5, column_stride=1)),
    "transposed expert": (
        (3, 4, 5),
        Role.LINEAR,
        MatrixView(start=40, rows=5, columns=4, row_stride=1, column_stride=5),
    ),
    "chunk of rows": ((9, 4), Role.LINEAR, MatrixView(start=12, rows=3, columns=4, row_stride=4, column_stride=1)),
    "every second row": ((8, 4), Role.LINEAR, MatrixView(start=4, rows=4, columns=4, row_stride=8, column_stride=1)),
    "slice of columns": ((6, 8), Role.LINEAR, MatrixView(start=2, rows=6, columns=3, row_stride=8, column_stride=1)),
    "columns down the rows": (
        (6, 8),
        Role.LINEAR,
        MatrixView(start=3, rows=4, columns=6, row_stride=1, column_stride=8),
    ),
    "part of a bias": ((10,), Role.BIAS, MatrixView(start=2, rows=5, columns=1, row_stride=1, column_stride=1)),
}


def shard_of(size, ranks, cut):
    """Uneven slices: the first rank gets `cut`, the others share the rest as FSDP does, some of them nothing."""
    rest = torch.arange(cut, size).chunk(ranks.size - 1) if ranks.size > 1 else ()
    mine = torch.arange(cut) if ranks.rank == 0 else rest[ranks.rank - 1] if ranks.rank <= len(rest) else None
    start, stop = (int(mine[0]), int(mine[-1]) + 1) if mine is not None and len(mine) else (size, size)
    return Shard(start=start, stop=stop, size=size, group=dist.group.WORLD)


def compare(name, ranks, cut):
    shape, role, part = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    base, tuned = (torch.randn(shape, generator=generator) for _ in range(2))
    use = Use(parameter="w", role=role, moment="w", view=part or role.view(shape), shape=shape)
    shard = shard_of(shape[0], ranks, min(cut, shape[0]))
    mine = slice(shard.start, shard.stop)
    whole = DenseDelta(tuned, base)
    sharded = ShardedDelta(DenseDelta(tuned[mine], base[mine]), torch.Size(shape), shard, ranks)

    columns = use.view.columns
    inputs = torch.randn((50, columns), generator=generator)
    hessian = inputs.square().mean(0) if role.is_diagonal else inputs.T @ inputs / 50
    assert digest(tuned) == digest_of_shard(tuned[mine], torch.Size(shape), shard, ranks)
    assert sharded.matrix(use).rows == whole.matrix(use).rows
    for rule in (Ridge(strength=0.7), SafeDelta(strength=3.0, exclude_top=0.0)):
        state = rule.factorise(LayerMoments(safety=hessian))
        theirs = rule.transform(state, whole.matrix(use))
        ours = rule.transform(state, sharded.matrix(use))
        torch.testing.assert_close(sharded.matrix(use).column_energy(ours), whole.matrix(use).column_energy(theirs))
        metric = Dense(matrix=hessian)
        expected = whole.transformed(use, theirs)
        adjusted = sharded.transformed(use, ours)
        torch.testing.assert_close(adjusted.weight(), expected.weight()[mine])
        assert abs(adjusted.matrix(use).inner(metric) - expected.matrix(use).inner(metric)) < 1e-4
        assert abs(adjusted.tuned_energy - expected.tuned_energy) < 1e-3
        assert abs(adjusted.lost_energy - expected.lost_energy) < 1e-3
        torch.testing.assert_close(sharded.weight(), tuned[mine])  # the tuned delta is never changed
    assert torch.equal(sharded.zero().weight(), base[mine])


def compare_held_by_all(name, ranks):
    shape, role, part = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    base, tuned = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    use = Use(parameter="w", role=role, moment="w", view=part or role.view(shape), shape=shape)
    whole, shared = DenseDelta(tuned, base), ReplicatedDelta(tuned, base, ranks)
    inputs = torch.randn((50, use.view.columns), generator=generator)
    hessian = inputs.square().mean(0) if role.is_diagonal else inputs.T @ inputs / 50
    for rule in (Ridge(strength=0.7), SafeDelta(strength=3.0, exclude_top=0.0)):
        state = rule.factorise(LayerMoments(safety=hessian))
        transform = rule.transform(state, shared.matrix(use))
        expected, adjusted = whole.transformed(use, transform), shared.transformed(use, transform)
        torch.testing.assert_close(adjusted.values, expected.values)
        torch.testing.assert_close(
            shared.matrix(use).column_energy(transform), whole.matrix(use).column_energy(transform)
        )
        metric = Dense(matrix=hessian)
        assert abs(adjusted.matrix(use).inner(metric) - expected.matrix(use).inner(metric)) < 1e-4
        written = [adjusted]
        if not role.is_diagonal:
            factor = factorise(hessian, 0.1).factor
            written.append(adjusted.rounded_along([(use, factor)]).rounded())
            torch.testing.assert_close(written[-1].values, expected.rounded_along([(use, factor)]).values)
        for one in written:
            assert len(set(ranks.gather(digest(one.weight())))) == 1
    torch.testing.assert_close(shared.values, whole.values)  # the tuned delta is never changed


def main():
    dist.init_process_group("gloo")
    ranks = Ranks.of_run()
    replicated.SHARED_WORK = 0
    for name in CASES:
        compare_held_by_all(name, ranks)
    for name, cut in itertools.product(CASES, (0, 1, 4)):
        try:
            compare(name, ranks, cut)
        except Exception as error:
            error.add_note(f"{name}, {cut} slices on the first rank")
            raise
    if ranks.is_main:
        print(f"compared {len(CASES)} layouts on {ranks.size} ranks")
    leave_together()


if __name__ == "__main__":
    main()
