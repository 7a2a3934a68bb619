"""What the header file of a profile says, and whether it can be so."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

import torch

from safedelta_hf.data.forms import IGNORED
from safedelta_hf.data.refusals import HeldOut
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.profile.encodings import Encoding, Float32, encoding_of
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import MatrixView, Use

T = TypeVar("T")

_LARGEST: Final = 2**63


def record(kind: type[T], value: Any, place: str) -> T:  # noqa: ANN401 - JSON
    """Make a record of what JSON gave.

    Args:
        kind: A dataclass whose fields are numbers, text, enumerations, records, or tuples and mappings of them.
        value: The content.
        place: What to call it in messages.

    Returns:
        The record.

    Raises:
        ValueError: Something is missing, superfluous, or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no mapping")
    assert is_dataclass(kind)
    names = {field.name for field in fields(kind)}
    if set(value) != names:
        raise ValueError(f"{place} lacks or should not have {', '.join(map(repr, sorted(names ^ set(value))[:3]))}")
    hints = get_type_hints(kind)
    made = kind(**{name: _typed(hints[name], value[name], f"{place}.{name}") for name in names})
    return made


def _typed(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401 - whatever the annotation says
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return record(kind, value, place)  # type: ignore[arg-type]
    if origin is UnionType:
        return None if value is None else _typed(inner[0], value, place)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(inner[0], entry, place) for entry in value)
    if origin is Mapping and isinstance(value, dict):
        return {_typed(str, key, place): _typed(inner[1], entry, f"{place}[{key!r}]") for key, entry in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if kind in (int, float) and type(value) is int and abs(value) < _LARGEST:
        return kind(value)
    if kind is float and type(value) is float and math.isfinite(value):
        return value
    if kind is str and type(value) is str:
        value.encode()  # half a surrogate pair could not be printed
        return value
    raise ValueError(f"{place} is {str(value)[:50]!r}, which is no {getattr(origin or kind, '__name__', kind)}")


HEADER_FILE: Final = "profile.json"
HEADER_LIMIT: Final = 32 * 2**20
"""Bytes of a header file, at most: it is read whole, and parsing it takes many times as much memory."""
FORMAT_VERSION: Final = ProfileHeader.format_version
READ_VERSIONS: Final = (5, FORMAT_VERSION)
"""Of format 5 are those without factors; nothing else in them is another."""
SHARD_PATTERN: Final = "moments-*-of-*.safetensors"

_SHARD_NAME: Final = re.compile(r"moments-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LARGEST_SIDES: Final = {1: 2**31, 2: 2**17}
"""Of diagonal and of full moments: a full one of more would take over 64 GiB, however small it is stored."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of moments.

    Attributes:
        bytes: Its size.
        digest: SHA-256 of its content.
    """

    bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class StoredMoment:
    """One moment in a file.

    Attributes:
        key: Its key.
        file: Name of its file.
        shape: Its shape when it is read.
        storage: Text of its encoding.
        sequences: Number of safety sequences behind it.
        tokens: Number of input vectors in it.
    """

    key: str
    file: str
    shape: tuple[int, ...]
    storage: str
    sequences: int
    tokens: int

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        return encoding_of(self.storage, is_stored=True)


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that the header file says.

    Attributes:
        header: What the profile was made from.
        uses: How each covered parameter is used.
        held_out: Safety data that is in no moment.
        files: The files of the moments, by name.
        moments: The moments, in order.
    """

    header: ProfileHeader
    uses: tuple[Use, ...]
    held_out: HeldOut | None
    files: Mapping[str, StoredFile]
    moments: tuple[StoredMoment, ...]

    def __post_init__(self) -> None:
        # Mutual consistency is no matter of how it was read.
        _require_counts(self.header)
        _require_types(self.header)
        _require_files(self.files, self.moments)
        for moment in self.moments:
            _require_plausible(moment, self.header.sequences)
        _require_room(self.files, self.moments)
        _require_uses(self.uses, {moment.key: moment for moment in self.moments}, self.header)
        _require_held_out(self.held_out)

    def to_json(self) -> str:
        """Write it as text, with its own digest.

        Returns:
            JSON.

        Raises:
            ProfileError: It is larger than a reader accepts.
        """
        content = asdict(self)
        if self.header.sorting is None:
            del content["header"]["sorting"]  # as files have it that are older than sorted tasks
        text = json.dumps({"digest": _digest(content), **content})
        if len(text) > HEADER_LIMIT:
            raise ProfileError(
                f"profile: its header would be {len(text)} bytes, more than {HEADER_LIMIT}; hold less safety data out"
            )
        return text

    @classmethod
    def from_json(cls, text: bytes) -> "Content":
        """Read what `to_json` wrote.

        Args:
            text: The text.

        Returns:
            The content.

        Raises:
            ValueError: It is something else, or has been changed.
        """
        try:
            return cls._parsed(text)
        except RecursionError as error:
            # Reading, digesting and describing it each go down as deep as it is nested.
            raise ValueError("it is nested without end") from error

    @classmethod
    def _parsed(cls, text: bytes) -> "Content":
        content: Any = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("header"), dict):
            raise ValueError("it has no 'header'")
        version = content["header"].get("format_version")
        if type(version) is not int or version not in READ_VERSIONS:
            read = " and ".join(map(str, READ_VERSIONS))
            raise ValueError(f"format version {str(version)[:20]}, this package reads {read}")
        written = content.pop("digest", None)
        if written != _digest(content):
            raise ValueError("its digest does not fit its content: it has been changed or damaged")
        content["header"].setdefault("sorting", None)
        return record(cls, content, HEADER_FILE)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_counts(header: ProfileHeader) -> None:
    seen: list[float] = [header.sequences, header.tokens]
    if header.retention is not None:
        seen += [header.retention.sequences, header.retention.tokens, header.retention.weight]
    if min(seen) <= 0:
        raise ValueError("its header counts no sequences or no tokens, or weighs ordinary data by nothing")


def _require_types(header: ProfileHeader) -> None:
    if odd := sorted(set(header.base) ^ set(header.dtypes)):
        raise ValueError(f"{odd[0][:100]!r} has a digest and no data type, or the other way round")
    for name, dtype in header.dtypes.items():
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"{name[:100]!r} is of the data type {dtype[:50]!r}, which torch does not know")
    if strangers := sorted(set(header.packed) - set(header.base)):
        raise ValueError(f"{strangers[0][:100]!r} is quantised, and no parameter of the base")


def _require_files(files: Mapping[str, StoredFile], moments: Iterable[StoredMoment]) -> None:
    for name, file in files.items():
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"{name[:100]!r} is no name of a file of moments")
        if not _DIGEST.fullmatch(file.digest) or file.bytes < 0:
            raise ValueError(f"{name} has no digest or no size")
    used, keys = [moment.file for moment in moments], [moment.key for moment in moments]
    if set(used) != set(files):
        raise ValueError(f"files and moments do not go together: {sorted(set(used) ^ set(files))[0][:100]!r}")
    if len(set(keys)) != len(keys):
        raise ValueError("two moments have the same key")


def _require_plausible(moment: StoredMoment, sequences: int) -> None:
    shape = moment.shape
    largest = _LARGEST_SIDES.get(len(shape), 0)
    if len(set(shape)) != 1 or not 0 < shape[0] <= largest:
        raise ValueError(f"moment {moment.key!r} has the shape {list(shape)[:5]}; expected [in, in] or [in]")
    if moment.sequences != sequences or moment.tokens < 0:
        raise ValueError(
            f"moment {moment.key!r} counts {moment.sequences} sequences and {moment.tokens} tokens, the profile "
            f"{sequences} sequences"
        )
    try:
        encoding = moment.encoding
    except ConfigurationError as error:
        raise ValueError(f"moment {moment.key!r}: {error}") from error
    if len(shape) == 1 and encoding != Float32():
        raise ValueError(f"moment {moment.key!r} is diagonal and stored as {moment.storage[:50]!r}")
    if len(shape) == 2 and encoding.suited(shape) != encoding:
        raise ValueError(f"moment {moment.key!r} of shape {list(shape)} cannot be stored as {moment.storage[:50]!r}")


def _require_room(files: Mapping[str, StoredFile], moments: Iterable[StoredMoment]) -> None:
    needed: Counter[str] = Counter()
    for moment in moments:
        needed[moment.file] += moment.encoding.bytes(moment.shape)
    for name, size in needed.items():
        if size > files[name].bytes:
            raise ValueError(f"{name} has {files[name].bytes} bytes, its moments need {size}")


def _require_uses(uses: Iterable[Use], moments: Mapping[str, StoredMoment], header: ProfileHeader) -> None:
    for use in uses:
        if use.moment not in moments:
            raise ValueError(f"{use.parameter!r} uses a moment that the profile does not hold: {use.moment!r}")
        if use.parameter not in header.base and use.parameter not in header.parametrised:
            raise ValueError(f"{use.parameter!r} is no parameter of the base")
        if use.role.is_diagonal != (len(moments[use.moment].shape) == 1):
            raise ValueError(f"{use.parameter!r} is used as {use.role}, its moment has another kind of shape")
        _require_view(use.parameter, use.view, use.shape)


def _require_view(parameter: str, view: MatrixView, shape: tuple[int, ...]) -> None:
    counts = view.rows, view.columns, view.row_stride, view.column_stride
    if view.start < 0 or min(counts) < 1:
        raise ValueError(f"{parameter!r} has a view with negative numbers, or without rows, columns or steps")
    if min(shape, default=1) < 1 or not view.fits(math.prod(shape)):
        raise ValueError(f"{parameter!r} has a view that does not fit into its shape, {list(shape)[:8]}")


def _require_held_out(held_out: HeldOut | None) -> None:
    if held_out is None:
        return
    if len(held_out.losses) != len(held_out.sequences):
        raise ValueError("held_out has other numbers of sequences and of losses")
    if not all(map(math.isfinite, held_out.losses)):
        raise ValueError("held_out has a loss that is no number")
    for sequence in held_out.sequences:
        labels = [label for label in sequence.labels if label != IGNORED]
        if len(sequence.input_ids) != len(sequence.labels) or min([*sequence.input_ids, *labels], default=-1) < 0:
            raise ValueError("held_out has a sequence without tokens, with negative ones, or with other labels")
