"""The callback in runs on two processes: each ends with the weights of the same run on one."""

import json

import pytest
from safetensors.torch import load_file

from tests.programs import training
from tests.programs.launching import accelerate_launch, passes

FULL = [case for case, settings in training.CASES.items() if not settings.get("lora")]
TOLERANCE = 1e-5
"""Relative, of each parameter in float32: what is left of another order of summation."""


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    for case in training.CASES:
        training.train("single", folder, case, world=1)
    return folder


def difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-12)) for name in one)


EVERY = tuple(training.CASES)
SOME = ("full", "measured", "from_files", "lora")


@pytest.mark.parametrize(
    ("backend", "cases"),
    [("ddp", EVERY), ("fsdp2", EVERY), ("fsdp1", EVERY), ("zero1", SOME), ("zero2", SOME), ("zero3", EVERY)],
)
def test_a_run_on_two_processes_ends_as_on_one(single, tmp_path, backend, cases):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    passes("tests.programs.training", backend, tmp_path, *cases)
    for case in cases:
        weights = [load_file(folder / f"{case}.safetensors") for folder in (single, tmp_path)]
        assert difference(*weights) < TOLERANCE, case
        reports = [json.loads((folder / f"{case}.json").read_text()) for folder in (single, tmp_path)]
        for one, other in zip(*(report["parameters"] for report in reports), strict=True):
            assert one["outcome"] == other["outcome"], (case, one["parameter"])
            assert one["shape"] == other["shape"]
            assert other["delta_energy"] == pytest.approx(one["delta_energy"], rel=1e-3)
            assert other["adjusted_loss"] == pytest.approx(one["adjusted_loss"], rel=1e-2, abs=1e-9)


def test_a_model_that_transformers_sharded_itself_ends_as_on_one_process(single, tmp_path):
    passes("tests.programs.training", "native", tmp_path, "full")
    assert difference(*(load_file(folder / "full.safetensors") for folder in (single, tmp_path))) < TOLERANCE


def test_accelerate_launch_starts_it_too(single, tmp_path):
    done = accelerate_launch("tests.programs.training", "ddp", tmp_path, "full")
    assert done.returncode == 0, done.stderr[-4000:]
    assert difference(*(load_file(folder / "full.safetensors") for folder in (single, tmp_path))) < TOLERANCE


def test_second_adapters_on_shards_and_wrapped_models_are_adjusted():
    assert "both passed" in passes("tests.programs.wrapped")
