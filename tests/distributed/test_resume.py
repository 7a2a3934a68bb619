"""A run that is killed by the system and started again ends as one that was not."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import tiny
from tests.programs import resuming
from tests.programs.launching import passes, python, torchrun

FILES = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


def run(folder, kind, *kill):
    """Run the script in a process of its own; returns how it ended."""
    process = python().Process(target=resuming.main, args=("single", folder, kind, *kill))
    process.start()
    process.join(timeout=300)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def prepared(folder):
    tiny.llama(attention_dropout=0.1).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folders = {kind: prepared(tmp_path_factory.mktemp(kind)) for kind in FILES}
    for kind, folder in folders.items():
        assert run(folder, kind) == 0
    return folders


def require_same_end(folder, expected, kind):
    for name in ("final", "tuned"):
        ended, wanted = (load_file(place / name / FILES[kind]) for place in (folder, expected))
        assert ended.keys() == wanted.keys()
        assert all(torch.equal(ended[key], wanted[key]) for key in wanted), name
    assert sorted(path.name for path in folder.iterdir()) == ["base", "final", "run", "tuned"]
    left = [path.name for path in (folder / "run").iterdir() if not path.name.startswith("checkpoint-")]
    assert left == [], "leftovers"


def half_written(folder, point, kind):
    """What the point leaves: of a killed `save_model` half a file, of a killed `keep_tuned` nothing under its name."""
    if point == "keep_tuned":
        assert not (folder / "tuned").exists() and list(folder.glob(f"_safedelta-*/tuned/{FILES[kind]}"))
    if point == "save_model":
        os.truncate(folder / "final" / FILES[kind], 1000)


KILLS = {
    "full": [
        ("capture", 20),
        ("step", 3),  # the first checkpoint is there
        ("replace", 5),  # of the resumed run: the base stands in for what was trained
        ("capture", 20),
        ("checkpoint_model", 1),
        ("checkpoint_state", 1),
        ("step", 2),
        ("keep_tuned", 1),
        ("replace", 30),  # when training has ended
        ("save_model", 1),
    ],
    # The base of an adapter is never written over.
    "lora": [
        ("capture", 20),
        ("step", 3),
        ("checkpoint_model", 1),
        ("keep_tuned", 1),
        ("replace", 10),
        ("save_model", 1),
    ],
}


@pytest.mark.parametrize("kind", FILES)
def test_a_run_killed_anywhere_and_started_again_ends_bit_for_bit_as_one_that_was_not(uninterrupted, tmp_path, kind):
    folder = prepared(tmp_path)
    for point, call in KILLS[kind]:
        assert run(folder, kind, point, call) == -signal.SIGKILL, (point, call)
        half_written(folder, point, kind)
    assert run(folder, kind) == 0
    require_same_end(folder, uninterrupted[kind], kind)


@pytest.mark.parametrize("backend", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_a_run_on_two_processes_that_is_killed_and_started_again_ends_bit_for_bit_as_one_that_was_not(
    backend, tmp_path
):
    whole, folder = prepared(tmp_path / "whole"), prepared(tmp_path / "killed")
    both = f"{whole},{folder}"
    for folders, *kill in [(both, "step", 3, 1), (folder, "replace", 35)]:
        done = torchrun("tests.programs.resuming", backend, folders, "full", *kill, timeout=400)
        assert done.returncode != 0
        assert "SIGKILL" in done.stderr, done.stderr[-4000:]
        assert not (folder / "final").exists()
    assert "started at checkpoint-6 and ended" in passes("tests.programs.resuming", backend, folder, "full")
    require_same_end(folder, whole, "full")
