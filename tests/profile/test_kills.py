"""A save that is killed anywhere leaves nothing that loads as complete but is not, and goes on to the same bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import SafetensorError

from safedelta_hf import SafetyProfile
from safedelta_hf.errors import OutputError, ProfileError
from safedelta_hf.profile import files
from tests.profile.saved_profiles import contents, same_moments, tiny_profile

ROOT = Path(__file__).parents[2]
BYTES = (0, 7, 200, 600, 1100)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 1000)


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("moments-*.safetensors")}


@pytest.mark.parametrize(("storage", "size"), [("triangular", 1500), ("eigenbasis:2", 1000)])
def test_a_killed_save_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, storage, size):
    monkeypatch.setattr(files, "SHARD_BYTES", size)
    tiny_profile().save(tmp_path / "source", "float32")
    profile = SafetyProfile.load(tmp_path / "source")
    profile.save(tmp_path / "expected", storage)
    expected, right = contents(tmp_path / "expected"), SafetyProfile.load(tmp_path / "expected")
    assert len(expected) > 5
    (tmp_path / "killed").mkdir()
    command = [
        "-m",
        "tests.profile.killing",
        tmp_path / "source",
        tmp_path / "killed",
        storage,
        *map(str, (size, *BYTES)),
    ]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    points = json.loads(result.stdout.splitlines()[-1])
    assert len(points) >= 30 + len(BYTES), len(points)
    for point in points:
        folder = tmp_path / "killed" / point / "profile"
        unfinished = folder.with_name(".profile.unfinished")
        assert not folder.exists() or contents(folder) == expected
        if unfinished.exists():
            require_incomplete_or_right(unfinished, right)
        done = finished(unfinished / "done.jsonl")
        before = stamps(unfinished) if unfinished.exists() else {}
        if not folder.exists():
            profile.save(folder, storage)
        assert contents(folder) == expected, point
        after = stamps(folder)
        assert all(after[name] == before[name] for name in done), f"{point}: a finished file was written again"
        assert [path.name for path in folder.parent.iterdir() if path.name not in ("profile", ".profile.lock")] == []


def finished(journal):
    """Names in the whole lines; the last one may be cut short."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [json.loads(line)["name"] for line in lines[1:] if line.endswith("}")]


def require_incomplete_or_right(unfinished, right):
    """Until the last file is there it does not load; from then on it is complete but for its name."""
    try:
        assert same_moments(SafetyProfile.load(unfinished), right)
    except ProfileError:
        pass


def test_what_an_interrupted_save_of_something_else_left_is_not_taken_over(tmp_path, small_shards, monkeypatch):
    one, other = tiny_profile(), SafetyProfile.load(saved(tmp_path / "other", tiny_profile(), "eigenbasis:2"))
    interrupted(one, tmp_path / "profile", monkeypatch)
    left = contents(tmp_path / ".profile.unfinished")
    other.save(tmp_path / "profile", "float32")
    other.save(tmp_path / "expected", "float32")
    assert len(left) > 3 and contents(tmp_path / "profile") == contents(tmp_path / "expected")


def test_a_damaged_file_of_an_interrupted_save_is_written_again(tmp_path, small_shards, monkeypatch):
    profile = tiny_profile()
    profile.save(tmp_path / "expected")
    interrupted(profile, tmp_path / "profile", monkeypatch)
    first = min((tmp_path / ".profile.unfinished").glob("moments-*"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    profile.save(tmp_path / "profile")
    assert contents(tmp_path / "profile") == contents(tmp_path / "expected")


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"[1]",
        b"{}",
        b"3",
        b'{"name": 3}',
        b'{"name": "x", "file": {}, "contents": ""}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
)
def test_a_damaged_journal_of_an_interrupted_save_is_no_obstacle(tmp_path, small_shards, monkeypatch, line):
    profile = tiny_profile()
    profile.save(tmp_path / "expected")
    interrupted(profile, tmp_path / "profile", monkeypatch)
    journal = tmp_path / ".profile.unfinished" / "done.jsonl"
    journal.write_bytes(b"\n".join([line, *journal.read_bytes().splitlines(), line]))
    before = stamps(journal.parent)
    profile.save(tmp_path / "profile")
    assert before and stamps(tmp_path / "profile") == before
    assert contents(tmp_path / "profile") == contents(tmp_path / "expected")


def test_a_folder_of_another_writer_is_left_alone_and_named(tmp_path):
    (tmp_path / ".profile.unfinished" / "parts").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds the folder 'parts'"):
        tiny_profile().save(tmp_path / "profile")
    assert [path.name for path in (tmp_path / ".profile.unfinished").iterdir()] == ["parts"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_a_disk_that_cannot_be_written_is_named_and_the_same_call_goes_on(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    profile = tiny_profile()
    with monkeypatch.context() as patched:
        patched.setattr(files, "save_file", fail)
        with pytest.raises(OutputError, match="profile' cannot be written .*No space left.* the same call goes on"):
            profile.save(tmp_path / "profile")
    profile.save(tmp_path / "profile")
    assert same_moments(SafetyProfile.load(tmp_path / "profile"), profile)


def test_two_writers_do_not_share_a_folder(tmp_path):
    with FileLock(tmp_path / ".profile.lock"), pytest.raises(OutputError, match="another process is writing it"):
        tiny_profile().save(tmp_path / "profile")
    tiny_profile().save(tmp_path / "profile")
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]


def saved(folder, profile, storage):
    profile.save(folder, storage)
    return folder


def interrupted(profile, folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("safedelta_hf.profile.files.Content.to_json", fail)
        with pytest.raises(OSError, match="disk full"):
            profile.save(folder)
    assert not folder.exists()
