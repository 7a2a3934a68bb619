"""Parameters are read and written alike however they are shared out; one launch of two processes for each backend."""

import importlib.util

import pytest

from tests.fixtures import tiny
from tests.programs.launching import forked
from tests.programs.tower import Checks


def every(*layouts: str) -> list[str]:
    return [f"{layout}.{name}" for layout in layouts for name in Checks.NAMES]


def require(done, check: str) -> None:
    assert f"passed {check}\n" in done.stdout, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


@pytest.fixture(scope="module")
def fsdp1():
    return forked("tests.programs.fsdp1")


@pytest.mark.parametrize(
    "check",
    [
        *every("full", "one_unit", "gradients", "none", "hybrid"),
        "bfloat16.read_after_forward",
        "bfloat16.forward",
        "use_orig_params.refused",
    ],
)
def test_fsdp1_holds_what_one_process_holds(fsdp1, check):
    require(fsdp1, check)


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tiny.llama(tied=True, vocab_size=47).save_pretrained(folder)  # no process holds as many rows as another
    return forked("tests.programs.fsdp2", folder)


@pytest.mark.parametrize(
    "check", [*every("two", "replicated", "replicated_once", "by_transformers"), "tensor_parallelism.refused"]
)
def test_fsdp2_holds_what_one_process_holds(fsdp2, check):
    require(fsdp2, check)


ZERO = [
    *(f"{stage}-{layout}" for stage in (1, 2, 3) for layout in ("plain", "optimizer_offloaded")),
    "3-always_freed",
    "3-offloaded",
]


@pytest.fixture(scope="module")
def zero():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    return forked("tests.programs.zero", 1, 2, 3)


@pytest.mark.parametrize(
    "check",
    [
        *every(*ZERO),
        *(f"{layout}.master" for layout in ZERO),
        *(f"{stage}-bfloat16.{name}" for stage in (1, 2, 3) for name in ("read", "read_after_write", "master")),
        *(f"{stage}-bfloat16.the_next_step_starts_from_what_was_written" for stage in (1, 2, 3)),
        *(f"{stage}-frozen.{name}" for stage in (1, 2, 3) for name in ("write", "training")),
    ],
)
def test_zero_holds_what_one_process_holds(zero, check):
    require(zero, check)
