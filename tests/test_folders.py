"""Folders and files are there whole or not at all; a log by which killed runs go on; temporary folders that go."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from safedelta_hf import folders
from safedelta_hf.errors import OutputError
from safedelta_hf.folders import RunLog, ScratchFolder, complete_file, complete_or_absent, require_writable, resumable


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


@pytest.mark.parametrize("place", ["file/inner/folder", "/proc/nowhere/folder"])  # where root can write nothing either
def test_where_nothing_can_be_made_is_told_before_anything_is(tmp_path, place):
    (tmp_path / "file").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for refused in (require_writable, lambda path: resumable(path).__enter__()):
        with pytest.raises(OutputError, match=r"cannot be written: nothing can be made in .*choose another place"):
            refused(tmp_path / place)
    require_writable(tmp_path / "not" / "there" / "yet")
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "precious"


def test_a_failure_leaves_no_lock_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("precious")
    with pytest.raises(OutputError, match="exists already"), resumable(tmp_path / "folder"):
        pytest.fail("it was entered")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


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


MADE = {"model": "m", "sizes": (1, 2), "further": None}
TEXT = 'line\nbreak \u2028 "quoted" \r'


def opened(path, **changes):
    return RunLog(path, MADE | changes, lambda line: (int(line["index"]), line["text"]))


@pytest.fixture
def path(tmp_path):
    log = opened(tmp_path / "log.jsonl")
    log.append({"index": 0, "text": TEXT})
    log.append({"index": 1, "text": "b"}, {"index": 2, "text": "c"})
    return log.path


def test_what_was_appended_is_found_in_order_below_the_manifest(path):
    assert opened(path).entries == [(0, TEXT), (1, "b"), (2, "c")]
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert lines[0] == {"manifest": {"model": "m", "sizes": [1, 2], "further": None}} and len(lines) == 4


def test_cut_off_anywhere_the_whole_lines_count_and_the_run_ends_with_the_same_bytes(path):
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        log = opened(path)
        kept = max(whole[:length].count(b"\n") - 1, 0)
        assert log.entries == [(0, TEXT), (1, "b"), (2, "c")][:kept]
        log.append(*({"index": index, "text": (TEXT, "b", "c")[index]} for index in range(kept, 3)))
        assert path.read_bytes() == whole, length


@pytest.mark.parametrize(
    "damage",
    [b"nonsense", b"", b"[]", b"3", b"{}", b'{"index": "x", "text": ""}', b"\xff\xfe", b"[" * 99999, b"\0" * 9],
)
@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_a_damaged_line_is_passed_over_and_those_after_it_count(path, damage, place):
    lines = path.read_bytes().split(b"\n")
    lines.insert(place, damage)
    path.write_bytes(b"\n".join(lines))
    log = opened(path)
    assert log.entries == [(0, TEXT), (1, "b"), (2, "c")]
    log.append({"index": 3, "text": "d"})
    assert opened(path).entries[-1] == (3, "d")


def test_a_line_that_damage_replaced_is_lost_alone(path):
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-3] + b"???"
    path.write_bytes(b"\n".join(lines))
    assert opened(path).entries == [(0, TEXT), (2, "c")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model": "n"}, "model"), ({"more": 1}, "more"), ({"sizes": [1], "further": 0}, "further and sizes")],
)
def test_what_is_made_from_something_else_is_refused_by_name_and_left_alone(path, changes, named):
    path.write_bytes(path.read_bytes() + b"cut")
    before = path.read_bytes()
    with pytest.raises(OutputError, match=f"log.jsonl.*made with other {named}; repeat that run .*or remove the file"):
        opened(path, **changes)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"precious", b"[]\n", b'{"a": 1}\n{"b": 2}\n', b'{"manifest": 3}\n', b"\n"])
def test_other_files_are_refused_and_left_alone(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(OutputError, match=r"log\.jsonl.*does not state what it is made from"):
        opened(tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_bytes() == content


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_an_append_that_fails_leaves_no_trace_and_the_next_one_succeeds(path, monkeypatch, failing):
    before, write = path.read_bytes(), os.write
    log = opened(path)

    def fail(descriptor, *content):
        if content:
            write(descriptor, bytes(content[0])[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            log.append({"index": 3, "text": "d"})
    assert path.read_bytes() == before
    log.append({"index": 3, "text": "d"})
    assert opened(path).entries[-1] == (3, "d") and len(opened(path).entries) == 4


def test_a_write_that_takes_only_a_part_is_continued(path, monkeypatch):
    write = os.write
    log = opened(path)
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, bytes(content)[:3]))
    log.append({"index": 3, "text": "d"})
    assert opened(path).entries[-1] == (3, "d")


KILLED = """
import os, resource, signal, sys
from pathlib import Path
from safedelta_hf.folders import RunLog
for limit in range(int(sys.argv[2])):
    path = Path(sys.argv[1]) / str(limit)
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        log = RunLog(path, {"a": 1}, dict)
        log.append({"one": 1})
        log.append({"two": 2}, {"three": 3}, sync=False)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), limit
"""


def test_killed_at_any_byte_the_next_run_finds_a_beginning_and_ends_with_the_same_bytes(tmp_path):
    entries = [{"one": 1}, {"two": 2}, {"three": 3}]
    whole = RunLog(tmp_path / "whole", {"a": 1}, dict)
    whole.append(*entries)
    expected = whole.path.read_bytes()
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(len(expected))]
    subprocess.run(command, check=True, capture_output=True)
    for path in (tmp_path / "killed").iterdir():
        log = RunLog(path, {"a": 1}, dict)
        assert log.entries == entries[: len(log.entries)]
        log.append(*entries[len(log.entries) :])
        assert path.read_bytes() == expected


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
