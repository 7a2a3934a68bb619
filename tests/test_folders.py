import os

import pytest
from filelock import FileLock

from safedelta_hf import folders
from safedelta_hf.errors import OutputError
from safedelta_hf.folders import complete_file, complete_or_absent, resumable


def test_a_failed_block_leaves_nothing_behind(tmp_path):
    with pytest.raises(OSError, match="disk full"), complete_or_absent(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("half")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_what_an_interrupted_run_left_is_found_by_the_next(tmp_path):
    with pytest.raises(KeyboardInterrupt), resumable(tmp_path / "parent" / "folder") as unfinished:
        (unfinished / "one").write_text("1")
        raise KeyboardInterrupt
    assert not (tmp_path / "parent" / "folder").exists()
    with resumable(tmp_path / "parent" / "folder") as unfinished:
        assert (unfinished / "one").read_text() == "1"
        (unfinished / "two").write_text("2")
    assert sorted(path.name for path in (tmp_path / "parent" / "folder").iterdir()) == ["one", "two"]
    assert [path.name for path in (tmp_path / "parent").iterdir()] == ["folder"]


def test_one_writer_at_a_time(tmp_path):
    with FileLock(tmp_path / ".folder.lock"):
        with pytest.raises(OutputError, match="another process"), resumable(tmp_path / "folder"):
            pytest.fail("two writers share the folder")
    with resumable(tmp_path / "folder") as unfinished:
        (unfinished / "file").touch()


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("folder", "file", "link"):
        with pytest.raises(OutputError, match="exists already"), resumable(tmp_path / name):
            pytest.fail("something would be overwritten")
    assert (tmp_path / "folder" / "precious").exists()


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "folder").mkdir()
    with resumable(tmp_path / "folder") as unfinished:
        (unfinished / "file").touch()
    assert (tmp_path / "folder" / "file").exists()


@pytest.mark.parametrize("write", [resumable, complete_or_absent])
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o027, 0o750), (0o002, 0o775)])
def test_those_may_read_what_was_written_whom_the_umask_lets(tmp_path, write, mask, mode):
    before = os.umask(mask)
    try:
        with write(tmp_path / "folder") as unfinished:
            (unfinished / "file").touch(mode=0o600)
    finally:
        assert os.umask(before) == mask
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == mode & 0o666
    assert (tmp_path / "folder").stat().st_mode & 0o777 == mode


def test_files_are_on_the_disk_before_the_folder_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(folders, "sync", lambda path: done.append((path.name, (tmp_path / "folder").exists())))
    with resumable(tmp_path / "folder") as unfinished:
        (unfinished / "file").touch()
    assert done == [("file", False), (".folder.unfinished", False), (tmp_path.name, True)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="disk full"), complete_file(path) as part:
        part.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with complete_file(path) as part:
        part.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]
