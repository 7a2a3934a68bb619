"""Folders and files that are complete or not there at all; temporary ones that no killed process leaves."""

import hashlib
import os
import platform
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from safedelta_hf.errors import OutputError

PREFIX = "_safedelta-"
"""How their names begin; a Trainer that pushes its folder to the Hub leaves out what begins with an underscore."""


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
        remove_abandoned(parent)
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


def remove_abandoned(parent: Path) -> None:
    """Remove the temporary folders of processes of this machine that were killed.

    Those of another may be in use: on some file systems that machines share, neither sees the locks of the other.

    Args:
        parent: Where to look.
    """
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
        OutputError: Another process is writing it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it, so that renaming or removing the folder does not take the lock along.
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(f"{str(folder)!r}: another process is writing it; wait, or choose another name") from error
    try:
        yield
        # While it is held: who opened it before finds that it has lost its name, and opens another.
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
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
