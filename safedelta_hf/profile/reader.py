"""Reading a profile: the header at once, each moment when it is asked for."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import ProfileError
from safedelta_hf.profile.header import HEADER_FILE, HEADER_LIMIT, SHARD_PATTERN, Content, StoredMoment
from safedelta_hf.profile.moments import Moments
from safedelta_hf.profile.shards import digest_of_file, read_moment

HUB_BLOBS = "blobs"
"""Where the Hub's cache keeps what the files of its snapshots are links to."""


def read_header(path: Path) -> Content:
    """Read the header file of a profile.

    Args:
        path: The file.

    Returns:
        What it says.

    Raises:
        ProfileError: It is missing, too large, of another format version, or malformed.
    """
    if not path.is_file():
        raise ProfileError(f"profile: {str(path.parent)!r} holds no {HEADER_FILE}; is it a folder that save() wrote?")
    if path.stat().st_size > HEADER_LIMIT:
        raise ProfileError(f"profile: {str(path)!r} is malformed (larger than {HEADER_LIMIT} bytes); collect it again")
    try:
        return Content.from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ProfileError(f"profile: {str(path)!r} is malformed ({error}); collect it again") from error


class MomentFiles(Moments):
    """Moments in files, read one at a time; a file is checked by its digest when it is first read.

    Args:
        content: What the header says.
        locate: Gives the path of a file by its name.
    """

    def __init__(self, content: Content, locate: Callable[[str], Path]) -> None:
        super().__init__({entry.key: entry for entry in content.moments})
        self._files = content.files
        self._together: dict[str, list[StoredMoment]] = {}
        for entry in content.moments:
            self._together.setdefault(entry.file, []).append(entry)
        self._locate = locate
        self._intact: dict[str, tuple[int, ...]] = {}

    def __getitem__(self, key: str) -> InputMoment:
        entry: StoredMoment = self._entries[key]
        try:
            path = self._locate(entry.file)
            self._require_intact(entry.file, path)
            return read_moment(path, entry, self._together[entry.file])
        except ProfileError:
            raise
        except (OSError, ValueError) as error:
            raise ProfileError(f"profile: {entry.file} cannot be read ({error}); collect the profile again") from error

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment.

        Args:
            key: Its key.

        Returns:
            What the header says.
        """
        entry: StoredMoment = self._entries[key]
        return entry.shape

    def identity(self) -> str:
        """What tells these moments from others, wherever their files are.

        Returns:
            A digest of what the header says of them: the digest of each file, and what is in it. None is read.
        """
        files = {name: asdict(file) for name, file in self._files.items()}
        entries = [asdict(entry) for entry in self._entries.values()]
        return hashlib.sha256(json.dumps([files, entries], sort_keys=True).encode()).hexdigest()

    def _require_intact(self, name: str, path: Path) -> None:
        status = path.stat()
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._intact.get(name) == seen:
            return
        if status.st_size != self._files[name].bytes:
            raise ValueError(f"it has {status.st_size} bytes, the header says {self._files[name].bytes}")
        if digest_of_file(path) != self._files[name].digest:
            raise ValueError("its digest is not that of the header: it was damaged or swapped")
        self._intact[name] = seen


def in_folder(folder: Path, content: Content) -> Callable[[str], Path]:
    """Where the files of a local profile are.

    Args:
        folder: The folder.
        content: What its header says.

    Returns:
        The path of a file by its name.

    Raises:
        ProfileError: A file is missing, superfluous, or lies elsewhere.
    """
    found = {path.name for path in folder.glob(SHARD_PATTERN)}
    if found != set(content.files):
        raise ProfileError(
            f"profile: {str(folder)!r} lacks or should not have {sorted(found ^ set(content.files))[0]!r}; the folder "
            "is not as save() wrote it: copy it again, or collect the profile again"
        )
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parent.parent / HUB_BLOBS)
    for name in content.files:
        path = Path(os.path.realpath(folder / name))
        if path.parent not in allowed or not path.is_file():
            raise ProfileError(f"profile: {name} in {str(folder)!r} is no file of that folder, but {str(path)!r}")
    return folder.joinpath
