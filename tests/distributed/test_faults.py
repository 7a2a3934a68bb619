"""A failure on one rank of a training: all ranks end with its message, and no weights are lost."""

import time

import pytest

from tests.programs import faults
from tests.programs.launching import passes, torchrun


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_failure_on_one_rank_is_heard_by_all_and_leaves_the_tuned_weights(backend, tmp_path):
    said = passes("tests.programs.faults", backend, tmp_path, *faults.FAULTS)
    assert [f"passed {name}" for name in faults.FAULTS] == [
        line for line in said.splitlines() if line.startswith("passed")
    ]


@pytest.mark.parametrize(("backend", "fault"), [("ddp", "adjusting"), ("fsdp2", "forward")])
def test_a_failure_that_nobody_catches_ends_all_ranks_at_once(backend, fault, tmp_path):
    done = torchrun("tests.programs.faults", backend, tmp_path, fault, timeout=300)
    ended = time.time()
    assert done.returncode != 0
    assert f"OSError: broken on purpose: {fault}" in done.stderr
    assert ("rank 1 failed" in done.stderr) == (fault == "adjusting"), "nobody can be told in a forward pass"
    failed = float(next(line for line in done.stdout.splitlines() if line.startswith("fails at")).split()[-1])
    assert ended - failed < 60
