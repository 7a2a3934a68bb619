"""Polishes on two processes: they end as on one, or are refused by name."""

import json

import pytest
from safetensors.torch import load_file

from tests.distributed.test_training import difference
from tests.programs import polishing
from tests.programs.launching import passes

TOLERANCE = 1e-4
"""Relative, of each parameter in float32."""

SHARED = ("full", "lora", "undone")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    for case in (*SHARED, "tied"):
        polishing.train("single", folder, case, world=1)
    return folder


@pytest.mark.parametrize(
    ("backend", "cases"),
    [("ddp", SHARED), ("fsdp2", (*SHARED, "tied")), ("fsdp1", ("full", "undone")), ("native", ("full",))],
)
def test_a_polish_on_two_processes_ends_as_on_one(backend, cases, single, tmp_path):
    passes("tests.programs.polishing", backend, tmp_path, *cases)
    for case in cases:
        weights = [load_file(folder / f"{case}.safetensors") for folder in (single, tmp_path)]
        assert difference(*weights) < TOLERANCE, case
        one, other = (json.loads((folder / f"{case}.json").read_text())["polish"] for folder in (single, tmp_path))
        assert one["outcome"] == other["outcome"] == ("undone" if case == "undone" else "kept")
        assert other["after"] == pytest.approx(one["after"], rel=1e-3)
        assert other["rows"] == one["rows"]


def test_what_a_second_trainer_cannot_go_on_with_is_refused_before_training(tmp_path):
    pytest.importorskip("deepspeed")
    assert passes("tests.programs.polishing", "zero3", tmp_path).count("refused") == 2
