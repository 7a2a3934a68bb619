"""The callback in runs on two processes: each ends with the weights of the same run on one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.programs import training
from tests.programs.launching import accelerate_launch, passes

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


def in_files(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def trained(tensors):
    """Without what a Trainer may write or not: the second name of a tied weight, and under ZeRO 3 what is frozen."""
    embeddings = [tensors[name] for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in tensors]
    tied = (
        {"lm_head.weight"} if any(torch.equal(tensors.get("lm_head.weight", one), one) for one in embeddings) else set()
    )
    return {name: tensors[name] for name in tensors if name not in tied and "base_layer" not in name}


def require_same(one, other, case):
    """What one run made of a case is what another made of it: weights, files, report and strength."""
    found = {
        "weights": difference(*(load_file(folder / f"{case}.safetensors") for folder in (one, other))),
        "tuned": difference(*(in_files(folder / f"{case}-tuned") for folder in (one, other))),
    }
    if (other / f"{case}-saved").exists():
        found["saved"] = difference(*(trained(in_files(folder / f"{case}-saved")) for folder in (one, other)))
    assert max(found.values()) < TOLERANCE, (case, found)
    wanted, told = (json.loads((folder / f"{case}.json").read_text()) for folder in (one, other))
    for expected, record in zip(wanted["parameters"], told["parameters"], strict=True):
        assert record["outcome"] == expected["outcome"], (case, expected["parameter"])
        assert record["shape"] == expected["shape"]
        assert record["delta_energy"] == pytest.approx(expected["delta_energy"], rel=1e-3)
        assert record["adjusted_loss"] == pytest.approx(expected["adjusted_loss"], rel=1e-2, abs=1e-9)
    assert told["metrics"].get("safedelta/strength") == wanted["metrics"].get("safedelta/strength"), case


EVERY = tuple(training.CASES)
SHARED = tuple(case for case in EVERY if case != "lora_experts")  # FSDP1 cannot train it
SOME = ("full", "measured", "tied", "from_files", "lora", "lora_experts", "lora_tied")
AFTERWARDS = ("full", "measured", "conv1d", "tied", "experts", "lora_linear", "lora_tied")
"""What can be put on a model that was sharded while it was loaded."""


UNEVEN = ("full", "tied", "lora_linear", "lora_tied")
"""Three processes share nothing out evenly."""


@pytest.mark.parametrize(
    ("backend", "cases", "processes"),
    [
        ("ddp", EVERY, 2),
        ("fsdp2", EVERY, 2),
        ("fsdp1", SHARED, 2),
        ("native", AFTERWARDS, 2),
        ("zero1", SOME, 2),
        ("zero2", SOME, 2),
        ("zero3", EVERY, 2),
        ("native", UNEVEN, 3),
        *(
            pytest.param(backend, UNEVEN, 3, marks=pytest.mark.slow)
            for backend in ("ddp", "fsdp2", "fsdp1", "zero1", "zero2", "zero3")
        ),
    ],
)
def test_a_run_on_several_processes_ends_as_on_one(single, tmp_path, backend, cases, processes):
    if backend.startswith("zero"):
        pytest.importorskip("deepspeed")
    passes("tests.programs.training", backend, tmp_path, *cases, processes=processes)
    for case in cases:
        require_same(single, tmp_path, case)


def test_accelerate_launch_starts_it_too(single, tmp_path):
    done = accelerate_launch("tests.programs.training", "ddp", tmp_path, "full")
    assert done.returncode == 0, done.stderr[-4000:]
    assert difference(*(load_file(folder / "full.safetensors") for folder in (single, tmp_path))) < TOLERANCE


def test_second_adapters_on_shards_and_wrapped_models_are_adjusted():
    assert "both passed" in passes("tests.programs.wrapped")
