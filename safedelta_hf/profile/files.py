"""The files of a profile: how they are written, so that a killed run goes on where it stopped, and read."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from typing_extensions import override

from safedelta_hf.core.low_rank import LowRank, Matrix, dense, tensors_of
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.refusals import HeldOut
from safedelta_hf.errors import OutputError, ProfileError, SafeDeltaError
from safedelta_hf.folders import RunLog, complete_file, resumable
from safedelta_hf.profile.encodings import Encoding, Factor, encoding_for
from safedelta_hf.profile.header import (
    FORMAT_VERSION,
    HEADER_FILE,
    HEADER_LIMIT,
    SHARD_PATTERN,
    Content,
    StoredFile,
    StoredMoment,
    record,
)
from safedelta_hf.profile.moments import Moments
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import Use

LOG_FILE: Final = "done.jsonl"
"""In an unfinished folder: what each finished file holds."""

_MANIFEST: Final = {"kind": "safety profile"}
"""Not what it is made from: each file is compared with what it is to hold, and the others are written again."""

HUB_BLOBS: Final = "blobs"
"""Where the Hub's cache keeps what the files of its snapshots are links to."""

_Line = tuple[str, tuple[StoredFile, str]]
"""Of the log: the name of a finished file, the file, and what it is to hold."""

SHARD_BYTES: Final = 8 * 2**20
"""Small moments share a file of up to this size; a larger one has its own. A file is read whole to check its digest."""
_TILE: Final = 256
"""Rows and columns of a moment that are checked at a time, so that what is made meanwhile stays in the cache."""
_NAMES: Final = {torch.float32: "F32", torch.bfloat16: "BF16"}
_UNDERFLOW: Final = 1e-12
_ROUNDING: Final = 0.02
"""How far entries may be from what a positive semi-definite symmetric matrix allows, as bfloat16 leaves them."""


def _shards(moments: Moments, storage: Encoding) -> dict[str, list[str]]:
    # Keys by name of the file, told by shapes alone.
    groups: list[list[str]] = []
    left = 0
    for key in moments:
        shape = moments.shape(key)
        size = encoding_for(shape, storage, moments.rank(key)).bytes(shape)
        if size > left:
            groups.append([])
            left = SHARD_BYTES
        groups[-1].append(key)
        left -= size
    return {f"moments-{number:05d}-of-{len(groups):05d}.safetensors": keys for number, keys in enumerate(groups, 1)}


def _write_shard(path: Path, totals: Mapping[str, Matrix], encodings: Mapping[str, Encoding]) -> None:
    stored = {}
    for key, total in totals.items():
        parts = encodings[key].encode(total)  # type: ignore[arg-type]
        stored.update({f"{key}/{part}": tensor.contiguous() for part, tensor in parts.items()})
    with complete_file(path) as part_file:
        save_file(stored, part_file)


def _require_tensors_of(moments: Iterable[StoredMoment], path: Path) -> None:
    # Raises ValueError where the file holds others than the header says.
    expected = {f"{entry.key}/{part}" for entry in moments for part in entry.encoding.layouts(entry.shape)}
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if found != expected:
        raise ValueError(f"it holds other tensors, such as {sorted(found ^ expected)[0][:100]!r}")


def _read_moment(path: Path, entry: StoredMoment) -> InputMoment:
    # Raises ValueError where the tensors are not as the header says.
    try:
        with safe_open(path, framework="pt") as file:
            stored = {}
            for part, layout in entry.encoding.layouts(entry.shape).items():
                name = f"{entry.key}/{part}"
                view = file.get_slice(name)
                if (view.get_dtype(), tuple(view.get_shape())) != (_NAMES[layout.dtype], layout.shape):
                    raise ValueError(f"{name!r} is {view.get_dtype()} {view.get_shape()}, not {layout}")
                stored[part] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    total = entry.encoding.decode(stored)
    return InputMoment(total=total, sequences=entry.sequences, tokens=entry.tokens)


def require_moment(total: Matrix, key: str) -> None:
    """Make sure that values can be a sum of products: finite, symmetric, and none larger than the diagonal allows.

    Args:
        total: [in, in], of low rank, or [in].
        key: What to call it.

    Raises:
        ValueError: They cannot.
    """
    if isinstance(total, LowRank):
        # Of such a form nothing else can be wrong; a negative rest would be hidden by the squares.
        squares = [total.factor.square().sum(0), *total.tensors[1:]]
        for one in squares:
            require_moment(one, key)
        return
    diagonal = total if total.dim() == 1 else total.diagonal()
    if not torch.isfinite(diagonal).all() or (diagonal < 0).any():
        raise ValueError(f"moment {key!r} holds NaN, Inf or a negative square")
    if total.dim() == 1:
        return
    # The squares of tiny inputs are zero in float32, while their products with others are not.
    root = (diagonal + _UNDERFLOW * diagonal.mean()).sqrt()
    tiles = [slice(start, start + _TILE) for start in range(0, len(total), _TILE)]
    for number, rows in enumerate(tiles):
        for columns in tiles[number:]:
            above, below = total[rows, columns], total[columns, rows].T
            allowed = root[rows, None] * root[columns]
            # NaN is not less than anything.
            bounded = torch.maximum(above.abs(), below.abs()) <= allowed * (1 + _ROUNDING)
            if not bounded.all() or not ((above - below).abs() <= allowed * _ROUNDING).all():
                raise ValueError(f"moment {key!r} is no symmetric positive semi-definite matrix")


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_values(total: Matrix) -> str:
    result = hashlib.sha256()
    for tensor in tensors_of(total):
        result.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return result.hexdigest()


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
    """
    with _failing_by_name(folder), resumable(folder) as unfinished:
        _require_own(unfinished)
        log = RunLog(unfinished / LOG_FILE, _MANIFEST, _line)
        shards = _shards(moments, storage)
        files: dict[str, StoredFile] = {}
        entries: list[StoredMoment] = []
        try:
            for name, keys in shards.items():
                encodings = {key: encoding_for(moments.shape(key), storage, moments.rank(key)) for key in keys}
                described = _shard(unfinished / name, {key: read(key) for key in keys}, encodings, log)
                files[name] = described[0]
                entries.extend(described[1])
            header = replace(header, format_version=FORMAT_VERSION)
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
    return [key for keys in _shards(moments, storage).values() for key in keys]


def _shard(
    path: Path, moments: Mapping[str, InputMoment], encodings: Mapping[str, Encoding], log: RunLog[_Line]
) -> tuple[StoredFile, list[StoredMoment]]:
    totals: dict[str, Matrix] = {}
    entries = []
    for key, moment in moments.items():
        total = totals[key] = _on_host(moment.total, encodings[key])
        require_moment(total, key)
        entries.append(
            StoredMoment(
                key=key,
                file=path.name,
                shape=tuple(total.shape),
                storage=str(encodings[key]),
                sequences=moment.sequences,
                tokens=moment.tokens,
            )
        )
    contents = json.dumps([[asdict(entry), _digest_of_values(totals[entry.key])] for entry in entries])
    file = _found(path, contents, dict(log.entries).get(path.name))
    if file is None:
        _write_shard(path, totals, encodings)
        file = StoredFile(bytes=path.stat().st_size, digest=_digest_of_file(path))
        log.append({"name": path.name, "file": asdict(file), "contents": contents})
    return file, entries


def _on_host(total: Matrix, encoding: Encoding) -> Matrix:
    if isinstance(total, LowRank) and isinstance(encoding, Factor):
        return total.to(torch.device("cpu"))
    return dense(total).detach().to("cpu").float().contiguous()


def _line(line: dict[str, Any]) -> _Line:
    return str(line["name"]), (record(StoredFile, line["file"], LOG_FILE), str(line["contents"]))


def _found(path: Path, contents: str, written: tuple[StoredFile, str] | None) -> StoredFile | None:
    # Only what is there, intact, and holds just that.
    if written is None or written[1] != contents or not path.is_file():
        return None
    file = written[0]
    if path.stat().st_size != file.bytes or _digest_of_file(path) != file.digest:
        return None
    return file


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
    """Moments in files, read one at a time; a file's digest and a moment's values are checked when they are first read.

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
        self._possible: set[str] = set()  # moments whose values were checked; those of a digest stay the same

    @override
    def __getitem__(self, key: str) -> InputMoment:
        entry: StoredMoment = self._entries[key]
        try:
            path = self._locate(entry.file)
            self._require_intact(entry.file, path)
            moment = _read_moment(path, entry)
            if key not in self._possible:
                require_moment(moment.total, key)
                self._possible.add(key)
            return moment
        except ProfileError:
            raise
        except (OSError, ValueError) as error:
            raise ProfileError(f"profile: {entry.file} cannot be read ({error}); collect the profile again") from error

    @override
    def shape(self, key: str) -> tuple[int, ...]:
        entry: StoredMoment = self._entries[key]
        return entry.shape

    @override
    def rank(self, key: str) -> int | None:
        encoding = self._entries[key].encoding
        return encoding.rank if isinstance(encoding, Factor) else None

    @override
    def identity(self) -> str:
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
        if _digest_of_file(path) != self._files[name].digest:
            raise ValueError("its digest is not that of the header: it was damaged or swapped")
        _require_tensors_of(self._together[name], path)
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
