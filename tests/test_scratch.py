"""Temporary folders: those of the living stay, those of the dead go."""

import multiprocessing
import os
import signal

import pytest

from safedelta_hf.folders import ScratchFolder, complete_or_absent


def killed(parent):
    (ScratchFolder(parent).path / "half").write_text("written")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def abandoned(tmp_path):
    """A folder that a killed process left, and its lock."""
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join()
    left = sorted(tmp_path.iterdir())
    assert process.exitcode == -signal.SIGKILL and len(left) == 2
    return left


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, abandoned):
    with complete_or_absent(tmp_path / "whole") as folder:
        (folder / "file").touch()
    assert not any(path.exists() for path in abandoned)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_in_use_is_left_alone_and_removed_at_its_end(tmp_path):
    one = ScratchFolder(tmp_path)
    other = ScratchFolder(tmp_path)
    assert one.path.is_dir() and other.path.is_dir()
    one.remove()
    other.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_given_up_stays_for_good(tmp_path):
    one = ScratchFolder(tmp_path)
    (one.path / "original").touch()
    one.keep()
    ScratchFolder(tmp_path).remove()
    assert [path.name for path in tmp_path.iterdir()] == [one.path.name]
    assert (one.path / "original").exists()


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "old").touch()
    with pytest.raises(RuntimeError), complete_or_absent(tmp_path / "it", replacing=True) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["old"]
    with complete_or_absent(tmp_path / "it", replacing=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "it").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
