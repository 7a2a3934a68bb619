"""Saving, training again, the best model and evaluation, on two processes."""

import pytest

from tests.programs import lifecycle
from tests.programs.launching import passes


@pytest.mark.parametrize("backend", lifecycle.CHECKS)
def test_what_holds_on_one_process_holds_on_two(backend, tmp_path):
    said = passes("tests.programs.lifecycle", backend, tmp_path)
    wanted = [f"passed {check.__name__}" for check in lifecycle.CHECKS[backend]]
    assert [line for line in said.splitlines() if line.startswith("passed")] == wanted
