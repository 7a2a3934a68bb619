"""Folders and files that are complete or not there at all, and logs by which a killed run goes on."""

import hashlib
import json
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from filelock import FileLock, Timeout

from safedelta_hf.errors import DataError, OutputError

T = TypeVar("T")

PREFIX = "_safedelta-"
"""How names of temporary folders begin; a Trainer that pushes its folder to the Hub leaves such names out."""


class ScratchFolder:
    """A temporary folder that belongs to this process; if it is killed, the next one made beside it cleans up.

    A lock beside the folder tells whether its process lives.

    Args:
        parent: Where to make it; made as well.

    Attributes:
        path: The folder.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.path = parent / f"{_own_prefix()}{secrets.token_hex(6)}"
        self._lock = FileLock(_lock_of(self.path))
        self._lock.acquire()  # before there is a folder, so that nobody takes it for an abandoned one
        try:
            self.path.mkdir(mode=0o700)
        except BaseException:
            self.keep()
            raise

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.keep()

    def keep(self) -> None:
        """Give it up as it is: from now on it is for the user to remove."""
        _lock_of(self.path).unlink(missing_ok=True)
        self._lock.release()


def _remove_abandoned(parent: Path) -> None:
    # Those of processes of this machine that were killed. Those of another machine may be in use: on some file systems
    # that machines share, neither sees the locks of the other.
    for path in parent.glob(f"{_own_prefix()}*.lock"):
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            continue  # its process lives, or it is another user's
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        path.unlink(missing_ok=True)
        lock.release()


def _own_prefix() -> str:
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f"{PREFIX}{machine}-"


def _lock_of(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name}.lock")


@contextmanager
def complete_or_absent(folder: Path, *, replacing: bool = False) -> Iterator[Path]:
    """Write a folder in a temporary place beside its own, and move it there once the block has succeeded.

    Args:
        folder: A folder that does not exist, or is empty; its parents are made.
        replacing: Whether it may be one with something in it, which is replaced as a whole.

    Yields:
        The folder to write into; it is removed if the block fails.
    """
    scratch = ScratchFolder(folder.parent)
    try:
        unfinished = scratch.path / folder.name
        unfinished.mkdir()
        yield unfinished
        if replacing and folder.exists():
            os.replace(folder, scratch.path / f"{folder.name}-replaced")
        finish(unfinished, folder)
    finally:
        scratch.remove()


@contextmanager
def resumable(folder: Path) -> Iterator[Path]:
    """Write a folder under a hidden name beside it, go on where an interrupted run stopped, and rename it at the end.

    What stands in the unfinished folder is what an earlier run left, possibly for something else: the block checks it,
    reuses what it can, and removes what does not belong there.

    Args:
        folder: A folder that does not exist, or is empty; its parents are made.

    Yields:
        The folder to write into: `.NAME.unfinished`. It stays if the block fails.

    Raises:
        OutputError: Another process is writing the same folder, or the folder is there already.
    """
    unfinished = unfinished_of(folder)
    with locked(folder):
        require_absent(folder)
        unfinished.mkdir(exist_ok=True)
        yield unfinished
        finish(unfinished, folder)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one who writes a folder, be it under its own name or as `.NAME.unfinished`.

    Args:
        folder: The folder; its parents are made.

    Yields:
        Nothing.

    Raises:
        OutputError: Another process is writing it, or nobody can.
    """
    require_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it, so that renaming or removing the folder does not take the lock along.
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{str(folder)!r}: another process is writing it; wait, or choose another name") from error
    try:
        yield
    finally:
        # While it is held: who opened it before finds that it has lost its name, and opens another.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def require_absent(folder: Path) -> None:
    """Stop where something would be overwritten.

    Args:
        folder: A folder to write.

    Raises:
        OutputError: It is there already and not empty, or is no folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(f"{str(folder)!r} exists already; remove it or choose another name")


def require_writable(path: Path) -> None:
    """Stop before hours of work whose result could not be written.

    Args:
        path: What will be written, with its parents.

    Raises:
        OutputError: Nothing can be made where it will stand.
    """
    place = next(one for one in path.absolute().parents if one.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} cannot be written: nothing can be made in {str(place)!r} ({error}); choose another place"
        ) from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside it, and rename it once its bytes are on the disk.

    Args:
        path: The file; one that is there is replaced.

    Yields:
        The file to write; it is removed if the block fails.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        text: Its content.

    Raises:
        OutputError: It cannot be written; one that was there is as it was.
    """
    try:
        with complete_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written ({error}); make room, or choose another place") from error


def read_saved(path: str | Path, what: str, made: Callable[[dict[str, Any]], T]) -> T:
    """Read what some results were saved as, in JSON.

    Args:
        path: The file.
        what: Which results are expected, for the error.
        made: Makes them of its content.

    Returns:
        The results.

    Raises:
        DataError: The file is missing, or is something else.
    """
    try:
        return made(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(f"{path} is no saved {what} ({error})") from error


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write to a file, whole.

    Args:
        descriptor: The file, at the place to write to.
        content: What to write.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left[:_AT_ONCE]) :]


_AT_ONCE: Final = 1 << 24
"""Bytes; some systems refuse to write gigabytes in one call."""

_HEAD: Final = b'{"manifest": '


class RunLog(Generic[T]):
    """What a run has finished, as JSON lines, so that one that was killed goes on where it stopped.

    The first line is the manifest: what everything is made from. Each further line tells of one thing that is finished.
    A line that was cut off is removed when the file is opened, and an append that fails leaves none, so the next line
    never joins a broken one. A line that is damaged otherwise is passed over; those after it count. That is safe
    because every line stands alone: it holds the result itself, or names a file with its digest, which is checked. So
    whatever is lost is done again, and nothing else.

    Args:
        path: The file, in a folder that is there; it is made.
        manifest: What the run is made from, as plain values.
        parse: Makes an entry of a line, and fails on what is none.

    Attributes:
        path: The file.
        entries: What the lines that were there tell, in order.

    Raises:
        OutputError: The file was begun by a run that is made from something else, or is no such file, or cannot be read
            or written. It is as it was.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], parse: Callable[[dict[str, Any]], T]) -> None:
        self.path = path
        self.entries: list[T] = []
        with self._failing_by_name():
            self._open(manifest, parse)

    def _open(self, manifest: Mapping[str, Any], parse: Callable[[dict[str, Any]], T]) -> None:
        path = self.path
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = [line for line in map(_mapping, whole.split(b"\n")) if line is not None]
        stated = next((line["manifest"] for line in lines if "manifest" in line), None)
        is_begun = bool(whole) or not _HEAD.startswith(content[: len(_HEAD)])
        if is_begun:
            self._require(stated, json.loads(json.dumps(manifest)))
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        if not is_begun:
            self.append({"manifest": manifest})
        for line in lines:
            try:
                if "manifest" not in line:
                    self.entries.append(parse(line))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # damaged, though still JSON

    def append(self, *entries: Mapping[str, Any], sync: bool = True) -> None:
        """Add lines; what fails adds none.

        Args:
            *entries: One for each line, as plain values.
            sync: Whether to wait until they are on the disk; else a machine that fails may lose them, a killed process
                does not.

        Raises:
            OutputError: They cannot be written, as on a full disk.
        """
        content = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        with self._failing_by_name(), self.path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                write_all(stream.fileno(), content)
                if sync:
                    os.fsync(stream.fileno())
            except BaseException:
                os.ftruncate(stream.fileno(), before)
                raise

    @contextmanager
    def _failing_by_name(self) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(
                f"{str(self.path)!r} cannot be read or written ({error}); make room, or choose another output"
            ) from error

    def _require(self, stated: Any, manifest: dict[str, Any]) -> None:  # noqa: ANN401 - JSON
        if not isinstance(stated, dict):
            raise OutputError(
                f"{str(self.path)!r}: does not state what it is made from, so it is damaged, or is something else; "
                "remove it, or choose another output"
            )
        keys = stated.keys() | manifest.keys()
        if differing := sorted(key for key in keys if stated.get(key) != manifest.get(key)):
            raise OutputError(
                f"{str(self.path)!r}: the run that began it was made with other {' and '.join(differing)}; repeat that "
                "run to go on there, or remove the file, or choose another output"
            )


def _mapping(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def finish(unfinished: Path, folder: Path) -> None:
    """Give a folder that holds all it should its own name.

    Args:
        unfinished: The folder under its temporary name.
        folder: Its own name.
    """
    # Temporary folders, and safetensors files, are made for their owner alone.
    allowed = ~_umask()
    for path in unfinished.iterdir():
        if path.is_file():
            path.chmod(0o666 & allowed)
            sync(path)
    unfinished.chmod(0o777 & allowed)
    sync(unfinished)
    os.replace(unfinished, folder)
    sync(folder.parent)


def _umask() -> int:
    # It can only be read by setting it; what another thread makes meanwhile is closed to others, not open to all.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def unfinished_of(folder: Path) -> Path:
    """Where a folder is made until it is complete.

    Args:
        folder: The folder.

    Returns:
        A hidden one beside it.
    """
    return folder.parent / f".{folder.name}.unfinished"


def sync(path: Path) -> None:
    """Wait until a file or folder is safe on disk: a rename may reach it before the bytes that it names.

    Args:
        path: The file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
