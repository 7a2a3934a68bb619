"""A failure on one rank of a training: all ranks end with its message, and no weights are lost."""

import time

import pytest

from tests.programs import faults
from tests.programs.launching import passes, torchrun

EVERY = tuple(name for name in faults.FAULTS if name != "reading")
RESCUED = ("factorise", "measure_lora")
"""One of a whole model, and one of an adapter."""


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("ddp", EVERY),
        ("fsdp2", EVERY),
        ("fsdp1", RESCUED),
        ("native", RESCUED),
        ("zero2", RESCUED),
        ("zero3", (*RESCUED, "reading")),
    ],
)
def test_a_failure_on_one_rank_is_heard_by_all_and_leaves_the_tuned_weights(backend, names, tmp_path):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    said = passes("tests.programs.faults", backend, tmp_path, *names)
    assert [f"passed {name}" for name in names] == [line for line in said.splitlines() if line.startswith("passed")]


@pytest.mark.parametrize(("backend", "fault"), [("ddp", "adjusting"), ("fsdp2", "forward")])
def test_a_failure_that_nobody_catches_ends_all_ranks_at_once(backend, fault, tmp_path):
    done = torchrun("tests.programs.faults", backend, tmp_path, fault, timeout=300)
    ended = time.time()
    assert done.returncode != 0
    assert f"OSError: broken on purpose: {fault}" in done.stderr
    assert ("rank 1 failed" in done.stderr) == (fault == "adjusting"), "nobody can be told in a forward pass"
    failed = float(next(line for line in done.stdout.splitlines() if line.startswith("fails at")).split()[-1])
    assert ended - failed < 60
