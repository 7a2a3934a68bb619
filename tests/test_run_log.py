"""The log by which killed runs go on: each line is there whole or not at all, whatever happens to the file."""

import json
import os
import subprocess
import sys

import pytest

from safedelta_hf.errors import OutputError
from safedelta_hf.folders import RunLog

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
