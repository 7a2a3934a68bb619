"""A profile that two processes collect is that of one; one launch for each way of holding the model."""

import importlib.util

import pytest

from tests.programs import capturing
from tests.programs.launching import passes, torchrun


@pytest.mark.parametrize("backend", ["whole", "fsdp2", "fsdp1", "zero3"])
def test_all_ranks_together_collect_the_profile_of_a_single_process(backend, tmp_path):
    if backend == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    done = passes("tests.programs.capturing", backend, tmp_path)
    for check in capturing.CHECKS + capturing.OF_BACKEND[backend]:
        assert f"{check.__name__}\n" in done


@pytest.mark.parametrize("backend", ["whole", "fsdp2"])
def test_a_rank_that_fails_in_a_forward_pass_ends_the_run_with_its_message(backend, tmp_path):
    done = torchrun(
        "tests.programs.capturing", backend, tmp_path, "failing", timeout=300
    )  # what a collective waits for is half an hour
    assert done.returncode != 0
    assert "layer 1 gave way" in done.stderr
