"""Writing a profile: file by file, so that a killed run goes on where it stopped."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from torch import Tensor

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.refusals import HeldOut
from safedelta_hf.errors import OutputError, ProfileError, SafeDeltaError
from safedelta_hf.folders import RunLog, complete_file, resumable
from safedelta_hf.profile.encodings import Encoding, encoding_for
from safedelta_hf.profile.header import HEADER_FILE, Content, StoredFile, StoredMoment, record
from safedelta_hf.profile.moments import Moments
from safedelta_hf.profile.shards import (
    digest_of_file,
    digest_of_values,
    require_moment,
    shards_of,
    write_shard,
)
from safedelta_hf.records import ProfileHeader, Use

LOG_FILE: Final = "done.jsonl"
"""In an unfinished folder: what each finished file holds."""

_MANIFEST: Final = {"kind": "safety profile"}
"""Not what it is made from: each file is compared with what it is to hold, and the others are written again."""


def write_profile(
    folder: Path,
    moments: Moments,
    storage: Encoding,
    read: Callable[[str], InputMoment],
    *,
    header: ProfileHeader,
    uses: tuple[Use, ...],
    held_out: HeldOut | None,
) -> None:
    """Write a profile, and go on with what an interrupted run left of the same one.

    Each moment is asked for once, in order, and held until its file is written.

    Args:
        folder: A folder that does not exist yet.
        moments: The moments, of which the shapes are used.
        storage: How to store them.
        read: Gives a moment by its key.
        header: What the profile was made from.
        uses: How each covered parameter is used.
        held_out: Safety data that is in no moment.

    Raises:
        ProfileError: The profile is not one that could be read again.
        OutputError: The folder exists, cannot be written, or another process is writing it.
    """  # noqa: DOC502 - raised by the folder
    with _failing_by_name(folder), resumable(folder) as unfinished:
        _require_own(unfinished)
        log = RunLog(unfinished / LOG_FILE, _MANIFEST, _line)
        shards = shards_of(moments, storage)
        files: dict[str, StoredFile] = {}
        entries: list[StoredMoment] = []
        try:
            for name, keys in shards.items():
                described = _shard(unfinished / name, {key: read(key) for key in keys}, storage, log)
                files[name] = described[0]
                entries.extend(described[1])
            content = Content(header=header, uses=uses, held_out=held_out, files=files, moments=tuple(entries))
        except ValueError as error:
            raise ProfileError(f"profile: it cannot be saved: {error}; collect it again") from error
        with complete_file(unfinished / HEADER_FILE) as path:
            path.write_text(content.to_json(), encoding="utf-8")
        for path in unfinished.iterdir():
            if path.name not in {*shards, HEADER_FILE}:
                path.unlink()


@contextmanager
def _failing_by_name(folder: Path) -> Iterator[None]:
    try:
        yield
    except SafeDeltaError:
        raise
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise OutputError(
            f"profile: {str(folder)!r} cannot be written ({error}); once that is mended, the same call goes on"
        ) from error


def _require_own(unfinished: Path) -> None:
    strangers = sorted(path.name for path in unfinished.iterdir() if path.is_dir() and not path.is_symlink())
    if strangers:
        raise OutputError(
            f"{str(unfinished)!r}: holds the folder {strangers[0]!r}, which is of no profile; something else was being "
            "written under that name: finish or remove it, or choose another name"
        )


def keys_in_order(moments: Moments, storage: Encoding) -> list[str]:
    """The order in which `write_profile` asks for moments.

    Args:
        moments: The moments.
        storage: How they will be stored.

    Returns:
        Their keys.
    """
    return [key for keys in shards_of(moments, storage).values() for key in keys]


def _shard(
    path: Path, moments: Mapping[str, InputMoment], storage: Encoding, log: RunLog["_Line"]
) -> tuple[StoredFile, list[StoredMoment]]:
    totals: dict[str, Tensor] = {}
    entries = []
    for key, moment in moments.items():
        total = moment.total.detach().to("cpu").float().contiguous()
        require_moment(total, key)
        totals[key] = total
        entries.append(
            StoredMoment(
                key=key,
                file=path.name,
                shape=tuple(total.shape),
                storage=str(encoding_for(tuple(total.shape), storage)),
                sequences=moment.sequences,
                tokens=moment.tokens,
            )
        )
    contents = json.dumps([[asdict(entry), digest_of_values(totals[entry.key])] for entry in entries])
    file = _found(path, contents, {line.name: line for line in log.entries}.get(path.name))
    if file is None:
        write_shard(path, totals, storage)
        file = StoredFile(bytes=path.stat().st_size, digest=digest_of_file(path))
        log.append(asdict(_Line(name=path.name, file=file, contents=contents)))
    return file, entries


@dataclass(frozen=True, kw_only=True)
class _Line:
    name: str
    file: StoredFile
    contents: str


def _line(line: dict[str, Any]) -> _Line:
    return record(_Line, line, LOG_FILE)


def _found(path: Path, contents: str, line: _Line | None) -> StoredFile | None:
    # Only what is there, intact, and holds just that.
    if line is None or line.contents != contents or not path.is_file():
        return None
    if path.stat().st_size != line.file.bytes or digest_of_file(path) != line.file.digest:
        return None
    return line.file
