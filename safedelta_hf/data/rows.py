"""Rows from files, from the Hub and from memory, each with its place for messages."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from safedelta_hf.errors import DataError, SafeDeltaError

T = TypeVar("T")

KINDS: Final = "a file of JSON lines, a JSON array, CSV or Parquet, a Dataset, or a list of rows"

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t"}
_HUB_NAME: Final = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*?)(?::(?P<split>[\w.-]+))?")
_FILE_ENDINGS: Final = (*_DELIMITERS, ".json", ".jsonl", ".parquet", ".txt", ".gz", ".zip")


class PlacedRow(NamedTuple):
    """One row.

    Attributes:
        place: What messages call it.
        row: The row, as it was found.
    """

    place: str
    row: Any


def read_rows(source: str | Path | Iterable[Any], *, plain: bool = False) -> list[PlacedRow]:
    """Read rows.

    Args:
        source: Path of a file of JSON lines, a JSON array, CSV (TSV), or Parquet; the name of a data set on the Hub,
            `org/name` or `org/name:split`; or any iterable of rows, such as a Dataset.
        plain: Whether a line that does not begin with a brace is a row itself, as text.

    Returns:
        The rows, in their order.

    Raises:
        DataError: There is no such file or data set, it is not what its ending says, or it has several splits.
    """
    if isinstance(source, str | Path):
        return _of_file(Path(source), plain) if _is_file(Path(source)) else _of_hub(str(source))
    if isinstance(source, Mapping):
        raise DataError(_several(source))
    # A data frame iterates over its columns.
    found: Any = source
    if hasattr(source, "iterrows"):
        found = found.to_dict("records")
    rows: list[PlacedRow] = []
    try:
        rows.extend(PlacedRow(f"row {number}", row) for number, row in enumerate(found))
    except Exception as error:
        if isinstance(error, SafeDeltaError):
            raise
        if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
            raise DataError(f"a {type(source).__name__} holds no rows; give {KINDS}") from error
        raise DataError(f"row {len(rows)} cannot be fetched ({type(error).__name__}: {error})") from error
    return rows


def is_on_hub(source: str | Path) -> bool:
    """Whether a text names a data set on the Hub, since there is no file of that name.

    Args:
        source: A path or a name.

    Returns:
        Whether it does, as far as its form tells.

    Raises:
        DataError: It is a folder, or cannot be read.
    """
    return not _is_file(Path(source)) and _hub_name(str(source)) is not None


def kept(source: T) -> T | list[Any]:
    """What can be read as often as one likes.

    Args:
        source: Rows, or where they are.

    Returns:
        The same; an iterator, which could be read only once, as a list.
    """
    return list(source) if isinstance(source, Iterator) else source


def _is_file(path: Path) -> bool:
    try:
        if path.is_dir():
            raise DataError(
                f"{str(path)!r} is a folder; give a file in it (a folder that save_to_disk wrote: the Dataset that "
                "datasets.load_from_disk gives)"
            )
        return path.is_file()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error}); give {KINDS}") from error


def _several(source: Mapping[Any, Any]) -> str:
    names = ", ".join(map(repr, source))
    if source and all(hasattr(part, "column_names") for part in source.values()):
        return f"it is a {type(source).__name__} with the splits {names}; pass one of them, as in data[NAME]"
    return f"it is a {type(source).__name__} with the keys {names}; give {KINDS}"


def _of_file(path: Path, plain: bool) -> list[PlacedRow]:
    ending = path.suffix.lower()
    try:
        if ending == ".parquet":
            return _of_parquet(path)
        if ending in _DELIMITERS:
            return _of_csv(path, _DELIMITERS[ending])
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text ({error}); save it as UTF-8, not compressed") from error
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error}); give {KINDS}") from error
    array = _array(path, text, plain) if text.lstrip().startswith("[") else None
    if array is not None:
        return [PlacedRow(f"{path.name} item {number}", row) for number, row in enumerate(array)]
    return [PlacedRow(f"{path.name} line {number}", row) for number, row in _of_lines(path.name, text, plain)]


def _array(path: Path, text: str, plain: bool) -> list[Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if plain and path.suffix.lower() != ".json":  # a prompt may begin with a bracket
            return None
        raise DataError(f"{path.name} begins like a JSON array but is none ({error})") from error
    assert isinstance(found, list), "it begins with a bracket"
    return found


def _of_lines(name: str, text: str, plain: bool) -> Iterator[tuple[int, Any]]:
    # A line ends where JSON lines end it: other breaks, such as U+2028, may stand inside of strings.
    for number, line in enumerate(text.split("\n"), start=1):
        stripped = line.strip().removeprefix("\ufeff")
        if not stripped or (plain and not stripped.startswith("{")):
            if stripped:
                yield number, stripped
            continue
        try:
            yield number, json.loads(stripped)
        except (ValueError, RecursionError) as error:
            begins = "begins with a brace but is" if plain else "is"
            advice = 'write a prompt that begins so as {"prompt": "..."}' if plain else "each line is one row"
            raise DataError(f"{name} line {number} {begins} not JSON ({error}); {advice}") from error


def _of_csv(path: Path, delimiter: str) -> list[PlacedRow]:
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                place = f"{path.name} line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{place} has not as many cells as the header has names: {reader.fieldnames}")
                rows.append(PlacedRow(place, {name: cell or None for name, cell in row.items()}))
        except csv.Error as error:
            raise DataError(f"{path.name} line {reader.line_num} is not CSV ({error})") from error
    return rows


def _of_parquet(path: Path) -> list[PlacedRow]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{path.name}: reading Parquet needs the package pyarrow, which comes with datasets ({error}); "
            "pip install datasets, or give JSON lines"
        ) from error
    try:
        found = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path.name} is not Parquet ({error})") from error
    return [PlacedRow(f"{path.name} row {number}", row) for number, row in enumerate(found)]


def _hub_name(name: str) -> re.Match[str] | None:
    parts = _HUB_NAME.fullmatch(name)
    return None if name.lower().endswith(_FILE_ENDINGS) or Path(name).parent.is_dir() else parts


def _of_hub(name: str) -> list[PlacedRow]:
    parts = _hub_name(name)
    if parts is None:
        raise DataError(f"there is no file {name!r}; give {KINDS}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"there is no file {name!r}, and a data set of the Hub needs the package datasets ({error}); "
            "pip install datasets"
        ) from error
    try:
        found = load_dataset(parts["name"], split=parts["split"])
    except Exception as error:
        raise DataError(
            f"there is no file {name!r}, and no data set of that name can be loaded from the Hub "
            f"({type(error).__name__}: {error}); load it with datasets.load_dataset and pass the split"
        ) from error
    if isinstance(found, Mapping):
        if len(found) != 1:
            raise DataError(f"{name!r} has the splits {', '.join(found)}; give one, as in '{name}:{next(iter(found))}'")
        (found,) = found.values()
    return [PlacedRow(f"{name} row {number}", row) for number, row in enumerate(found)]
