"""Temporary folders that no killed process leaves for ever."""

import hashlib
import platform
import secrets
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

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
