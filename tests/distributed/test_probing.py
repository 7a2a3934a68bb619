"""Probed runs on two processes: under DDP they end as on one, elsewhere they are refused by name."""

import pytest
from safetensors.torch import load_file

from tests.distributed.test_training import TOLERANCE, difference
from tests.programs import probing
from tests.programs.launching import passes


def test_a_probed_run_on_two_processes_ends_as_on_one_with_the_joint_batch(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    for case in probing.CASES:
        probing.train("single", one, case, world=1)
    passes("tests.programs.probing", "ddp", two)
    for case in probing.CASES:
        weights = [load_file(folder / f"{case}.safetensors") for folder in (one, two)]
        assert difference(*weights) < 10 * TOLERANCE, case


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_a_model_whose_weights_are_sharded_is_refused_by_name(backend, tmp_path):
    if backend == "zero3":
        pytest.importorskip("deepspeed")
    assert passes("tests.programs.probing", backend, tmp_path).count("refused") == 2
