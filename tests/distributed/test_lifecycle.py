"""Saving, training again, the best model and evaluation, on two processes."""

import pytest

from tests.distributed import lifecycle
from tests.distributed.launching import passes


@pytest.mark.parametrize("backend", lifecycle.CHECKS)
def test_what_holds_on_one_process_holds_on_two(backend, tmp_path):
    said = passes("tests.distributed.lifecycle", backend, tmp_path)
    wanted = [f"passed {check.__name__}" for check in lifecycle.CHECKS[backend]]
    assert [line for line in said.splitlines() if line.startswith("passed")] == wanted
