"""A run that is killed anywhere leaves nothing that loads, and the next one ends with the same bytes as any other."""

import multiprocessing
import os
import random
import shutil
import signal
from contextlib import suppress

import pytest

from safedelta_hf.errors import CheckpointError, SafeDeltaError
from safedelta_hf.report.provenance import RECORD_FILE, read_provenance
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.fixtures import checkpoints, tiny

STEPS = ("write", "sendfile", "replace", "fsync", "truncate", "mkdir", "unlink", "rmdir")
"""Everything by which a run changes what is on disk."""


def contents(folder):
    """All files but the record, which has a date, and is that of these weights."""
    assert read_provenance(folder).is_of_weights
    return checkpoints.contents(folder, but=(RECORD_FILE,))


class Killer:
    """Ends the process as `kill -9` does, in the midst of one of its steps."""

    def __init__(self, at: int) -> None:
        self.steps, self.at = 0, at
        for name in STEPS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, function):
        def step(*values, **settings):
            self.steps += 1
            if self.steps == self.at:
                if name == "write":
                    function(values[0], bytes(values[1])[: len(values[1]) // 2])
                elif self.at % 2:
                    with suppress(OSError):
                        function(*values, **settings)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*values, **settings)

        return step


def run_killed(case, at, queue=None):
    killer = Killer(at)
    case.adjust()
    if queue is not None:
        queue.put(killer.steps)


def in_child(*values):
    child = multiprocessing.get_context("fork").Process(target=run_killed, args=values)
    child.start()
    child.join()
    return child.exitcode


def steps_of(case):
    queue = multiprocessing.get_context("fork").SimpleQueue()
    assert in_child(case, 0, queue) == 0
    return queue.get()


@pytest.fixture(scope="module", params=["4KB", "50GB"], ids=["sharded", "one file"])
def reference(request, tmp_path_factory):
    """A case, what an evaluating run makes of it, its report, and the number of its steps."""
    case = checkpoints.case(tmp_path_factory.mktemp("kills"), "one layer", shards=request.param)
    steps = steps_of(case)
    found = contents(case.output)
    shutil.rmtree(case.output)
    report = case.adjust()
    assert contents(case.output) == found
    shutil.rmtree(case.output)
    return case, found, report, steps


def assert_nothing_incomplete_loads(case, complete):
    for folder in (case.output, case.work, case.work / "model"):
        if not folder.exists():
            continue
        for opens in (SafetensorsFiles, tiny.loaded):
            try:
                opens(folder)
            except (SafeDeltaError, OSError, ValueError):
                assert folder != case.output
            else:
                assert contents(folder) == complete


def finished(case, complete, report):
    """Run until the end, as often as it takes."""
    try:
        assert case.adjust().to_dict() == report.to_dict()
    except CheckpointError as error:
        # Killed while the work folder of a complete output was being removed.
        assert "exists already" in str(error)
    assert contents(case.output) == complete and not case.work.exists()
    shutil.rmtree(case.output)


def test_killed_at_any_step_nothing_loads_and_the_next_run_ends_with_the_same_bytes(reference):
    case, complete, report, steps = reference
    assert steps >= 30
    for point in range(1, steps + 1):
        assert in_child(case, point) == -signal.SIGKILL
        assert_nothing_incomplete_loads(case, complete)
        finished(case, complete, report)


def test_killed_again_and_again_it_still_arrives(reference):
    case, complete, report, steps = reference
    draw = random.Random(0)
    for _ in range(4):
        for _ in range(5):  # the last steps cannot be taken up half-way, so it need not arrive however often it starts
            if case.output.exists() or in_child(case, draw.randrange(10, steps // 2)) != -signal.SIGKILL:
                break
            assert_nothing_incomplete_loads(case, complete)
        if case.output.exists() and not case.work.exists():
            assert contents(case.output) == complete
            shutil.rmtree(case.output)
        else:
            finished(case, complete, report)
