"""Defences in the steps of runs on two processes: they end as on one, or are refused by name."""

import pytest
from safetensors.torch import load_file

from tests.distributed.test_training import TOLERANCE, difference
from tests.programs import defending
from tests.programs.launching import passes


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    for case in defending.CASES:
        defending.train("single", folder, case, world=1)
    return folder


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "fsdp1", "zero3"])
def test_a_run_on_two_processes_ends_as_on_one_with_the_joint_batch_or_is_refused(backend, single, tmp_path):
    if backend == "zero3":
        pytest.importorskip("deepspeed")
    said = passes("tests.programs.defending", backend, tmp_path)
    for case in defending.WORKING[backend]:
        weights = [load_file(folder / f"{case}.safetensors") for folder in (single, tmp_path)]
        assert difference(*weights) < 10 * TOLERANCE, case
    for case in defending.refusing(backend):
        assert said.count(f"{case} refused") == 2
