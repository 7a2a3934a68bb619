"""Plain data to records: every field is there, of its type, and nothing else is."""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import UnionType
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

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
