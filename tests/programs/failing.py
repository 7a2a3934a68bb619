"""What the other ranks hear of one that fails; run under torchrun."""

import sys

import torch
import torch.distributed as dist

from safedelta_hf.core.transform import KeepColumns
from safedelta_hf.distributed.ranks import Ranks, is_shared
from safedelta_hf.errors import ConfigurationError, RankError, SafeDeltaError
from tests.programs.leaving import leave_together


def failed(ranks, block, who=1):
    """The error that this rank ends with when one of them fails somewhere in a block of collectives."""
    try:
        with ranks.together():
            block(ranks.rank == who)
    except SafeDeltaError as error:
        return error
    raise AssertionError("nothing was raised")


def in_the_middle(ranks):
    def block(fails):
        ranks.sum_(torch.ones(3))
        if fails:
            raise ConfigurationError("weights.bin: broken")
        ranks.sum_(torch.ones(3))
        ranks.gather(1)

    return block


def at_the_end(ranks):
    def block(fails):
        ranks.gather(1)
        if fails:
            raise ConfigurationError("weights.bin: broken")

    return block


def nested_and_renamed(ranks):
    def block(fails):
        try:
            with ranks.together():
                at_the_end(ranks)(fails)
        except SafeDeltaError as error:
            raise error.at("layer 3") from error

    return block


def main(*arguments):
    alone = "alone" in arguments
    dist.init_process_group("gloo")
    ranks = Ranks.of_run()
    assert Ranks.of_run() is ranks
    for make in (in_the_middle, at_the_end, nested_and_renamed):
        error = failed(ranks, make(ranks))
        wanted = ConfigurationError if ranks.rank == 1 else RankError
        assert isinstance(error, wanted), (make, error)
        assert "weights.bin: broken" in str(error), error
        assert ranks.rank == 1 or "rank 1" in str(error), error
        assert is_shared(error)
    assert ranks.gather(ranks.rank) == list(range(ranks.size))  # all of them are in step again
    assert ranks.share([10, 11, 12]) == [10, 11, 12][ranks.rank :: ranks.size]
    given = KeepColumns(kept=torch.tensor([True, False]), response=torch.ones(1, 1, dtype=torch.bfloat16), notes=("x",))
    told = ranks.broadcast(given if ranks.rank == 1 else None, owner=1)
    assert torch.equal(told.kept, given.kept)
    assert torch.equal(told.response, given.response)
    assert told.notes == ("x",)
    if alone and ranks.rank == 1:
        with ranks.together(), ranks.within_collectives():
            raise ConfigurationError("lost in a forward pass")
    if alone:
        dist.barrier()  # stands for a collective of a library, in which nobody can be told anything
    if ranks.is_main:
        print("all in step")
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
