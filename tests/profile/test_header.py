"""What a header says is what was written, field by field of its type; anything else is a ValueError that names it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

import pytest

from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.refusals import HeldOut
from safedelta_hf.errors import ProfileError
from safedelta_hf.profile import header as module
from safedelta_hf.profile.header import Content, StoredFile, StoredMoment, record
from safedelta_hf.records.header import ProfileHeader, Retention
from safedelta_hf.records.sorting import Outcome, RefusedExample, TaskSorting
from safedelta_hf.records.uses import MatrixView, Role, Use


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int
    share: float
    text: str
    colour: Colour
    inner: Inner
    maybe: Inner | None
    several: tuple[int, ...]
    named: Mapping[str, Inner]
    nested: Mapping[str, tuple[str, ...]]


WHOLE = Outer(
    count=3,
    share=0.5,
    text="é",
    colour=Colour.RED,
    inner=Inner(number=-1),
    maybe=None,
    several=(1, 2),
    named={"a": Inner(number=2)},
    nested={"b": ("c", "d")},
)


@pytest.mark.parametrize(
    "changes", [{}, {"maybe": Inner(number=4)}, {"several": (), "named": {}, "nested": {}}, {"share": 2.0}]
)
def test_a_record_comes_back_from_json_as_it_was(changes):
    whole = replace(WHOLE, **changes)
    found = record(Outer, json.loads(json.dumps(asdict(whole))), "it")
    assert found == whole and isinstance(found.colour, Colour) and isinstance(found.several, tuple)


def test_a_whole_number_may_stand_for_any():
    found = record(Outer, json.loads(json.dumps(asdict(WHOLE) | {"share": 2})), "it").share
    assert found == 2.0 and type(found) is float


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        ("count", 3.0, "it.count"),
        ("count", True, "it.count"),
        ("count", "3", "it.count"),
        ("count", None, "it.count"),
        ("count", 2**63, "it.count"),
        ("share", float("nan"), "it.share"),
        ("share", float("inf"), "it.share"),
        ("share", False, "it.share"),
        ("text", 3, "it.text"),
        ("text", "\ud800", "surrogates"),
        ("colour", "blue", "blue"),
        ("inner", [], "it.inner is no mapping"),
        ("inner", {"number": "x"}, "it.inner.number"),
        ("inner", {}, "it.inner lacks or should not have 'number'"),
        ("maybe", 3, "it.maybe is no mapping"),
        ("several", "12", "it.several"),
        ("several", [1, "2"], "it.several"),
        ("several", {"0": 1}, "it.several"),
        ("named", [], "it.named"),
        ("named", {"a": 3}, r"it.named\['a'\] is no mapping"),
        ("nested", {"b": "cd"}, r"it.nested\['b'\]"),
        ("nested", {"b": [["c"]]}, r"it.nested\['b'\]"),
    ],
)
def test_a_field_of_another_type_is_named(field, value, place):
    given = asdict(WHOLE) | {"several": [1, 2], "nested": {}} | {field: value}
    with pytest.raises(ValueError, match=place):
        record(Outer, given, "it")


@pytest.mark.parametrize("change", [lambda given: given.pop("text"), lambda given: given.update(text2="")])
def test_what_is_missing_or_superfluous_is_named(change):
    given = asdict(WHOLE)
    change(given)
    with pytest.raises(ValueError, match="it lacks or should not have 'text2?'"):
        record(Outer, given, "it")


FILE = "moments-00001-of-00001.safetensors"
HEADER = ProfileHeader(
    architecture="A",
    base={"w": "1", "b": "2"},
    dtypes={"w": "float32", "b": "float32"},
    tokenizer=None,
    data="3",
    sequences=4,
    tokens=9,
    skipped={},
    parametrised={},
)
FULL = StoredMoment(key="w", file=FILE, shape=(3, 3), storage="float32", sequences=4, tokens=9)
DIAGONAL = StoredMoment(key="b", file=FILE, shape=(2,), storage="float32", sequences=4, tokens=9)
USES = (
    Use(parameter="w", role=Role.LINEAR, moment="w", view=MatrixView.contiguous(2, 3), shape=(2, 3)),
    Use(parameter="b", role=Role.SCALE, moment="b", view=MatrixView.contiguous(1, 2), shape=(2,)),
)
SORTING = TaskSorting(
    outcome=Outcome.HARMFUL,
    examples=9,
    refused=5,
    near=4,
    left_out=5,
    unjudged=1,
    shown=(RefusedExample(row=3, probability=0.75, prompt="é"),),
)
HELD = HeldOut(sequences=(SafetySequence(input_ids=(1, 2), labels=(-100, 2)),), losses=(0.5,))
PARTS = {
    "header": HEADER,
    "uses": USES,
    "held_out": HELD,
    "files": {FILE: StoredFile(bytes=500, digest="0" * 64)},
    "moments": (FULL, DIAGONAL),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"held_out": None},
        {"header": replace(HEADER, name="org/base", revision="1" * 40, packed=("w",))},
        {"header": replace(HEADER, retention=Retention(data="4", sequences=1, tokens=2, weight=0.1))},
        {"header": replace(HEADER, sorting=SORTING)},
    ],
)
def test_a_header_comes_back_as_it_was_written(changes):
    content = Content(**PARTS | changes)
    assert Content.from_json(content.to_json().encode()) == content


def test_a_profile_that_was_not_sorted_says_nothing_of_it():
    # So that files that were written before tasks were sorted are read, and written again as they are.
    assert "sorting" not in json.loads(Content(**PARTS).to_json())["header"]


def test_any_change_of_a_written_header_is_found():
    text = Content(**PARTS).to_json()
    changed = json.loads(text)
    changed["header"]["tokens"] += 1
    with pytest.raises(ValueError, match="digest does not fit"):
        Content.from_json(json.dumps(changed).encode())
    del changed["digest"]
    with pytest.raises(ValueError, match="digest does not fit"):
        Content.from_json(json.dumps(changed).encode())
    changed["header"]["format_version"] = 3
    with pytest.raises(ValueError, match="format version 3, this package reads 5 and 6"):
        Content.from_json(json.dumps(changed).encode())
    for other in (b"[]", b"{}", b'{"header": 3}'):
        with pytest.raises(ValueError, match="no 'header'"):
            Content.from_json(other)
    with pytest.raises(ValueError, match="nested without end"):
        Content.from_json(b"[" * 100_000)


def use(**changes):
    return (replace(USES[0], **changes), USES[1])


def held(losses=(0.5,), labels=(-100, 2), ids=(1, 2)):
    return HeldOut(sequences=(SafetySequence(input_ids=ids, labels=labels),), losses=losses)


def with_ordinary(**changes):
    settings = {"data": "4", "sequences": 1, "tokens": 2, "weight": 0.1} | changes
    return replace(HEADER, retention=Retention(**settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"header": replace(HEADER, tokens=0)}, "counts no sequences or no tokens"),
        ({"header": replace(HEADER, dtypes={"w": "float32"})}, "'b' has a digest and no data type"),
        ({"header": replace(HEADER, dtypes={**HEADER.dtypes, "c": "float32"})}, "'c' has a digest and no data type"),
        ({"header": replace(HEADER, dtypes={"w": "float32", "b": "load"})}, "'b' is of the data type 'load'"),
        ({"header": replace(HEADER, packed=("c",))}, "'c' is quantised, and no parameter of the base"),
        ({"header": with_ordinary(weight=0.0)}, "weighs ordinary data by nothing"),
        ({"header": with_ordinary(sequences=0)}, "counts no sequences"),
        ({"files": {"other": StoredFile(bytes=500, digest="0" * 64)}}, "'other' is no name of a file"),
        ({"files": {FILE: StoredFile(bytes=500, digest="0" * 63)}}, "has no digest or no size"),
        ({"files": {FILE: StoredFile(bytes=-1, digest="0" * 64)}}, "has no digest or no size"),
        ({"files": {}}, "files and moments do not go together"),
        ({"files": {FILE: StoredFile(bytes=43, digest="0" * 64)}}, "has 43 bytes, its moments need 44"),
        ({"moments": (FULL, DIAGONAL, FULL)}, "two moments have the same key"),
        ({"moments": (replace(FULL, shape=(3, 4)), DIAGONAL)}, r"has the shape \[3, 4\]"),
        ({"moments": (replace(FULL, shape=(3, 3, 3)), DIAGONAL)}, r"has the shape \[3, 3, 3\]"),
        ({"moments": (replace(FULL, shape=(0, 0)), DIAGONAL)}, r"has the shape \[0, 0\]"),
        ({"moments": (replace(FULL, shape=(2**18, 2**18)), DIAGONAL)}, "has the shape"),
        ({"moments": (replace(FULL, sequences=5), DIAGONAL)}, "counts 5 sequences and 9 tokens"),
        ({"moments": (replace(FULL, tokens=-1), DIAGONAL)}, "-1 tokens"),
        ({"moments": (replace(FULL, storage="float33"), DIAGONAL)}, "moment 'w': storage='float33'"),
        ({"moments": (FULL, replace(DIAGONAL, storage="triangular"))}, "is diagonal and stored as 'triangular'"),
        ({"moments": (replace(FULL, storage="eigenbasis:3"), DIAGONAL)}, "cannot be stored as 'eigenbasis:3'"),
        ({"uses": use(moment="other")}, "uses a moment that the profile does not hold"),
        ({"uses": use(parameter="other")}, "'other' is no parameter of the base"),
        ({"uses": use(role=Role.SCALE)}, "its moment has another kind of shape"),
        ({"uses": use(moment="b")}, "its moment has another kind of shape"),
        ({"uses": use(view=MatrixView.contiguous(2, 3, start=-1))}, "negative numbers"),
        ({"uses": use(view=MatrixView.contiguous(0, 3))}, "without rows"),
        ({"uses": use(view=MatrixView.contiguous(2, 3, start=1))}, "does not fit into its shape"),
        ({"uses": use(shape=(0, 3))}, "does not fit into its shape"),
        ({"held_out": held(losses=())}, "other numbers of sequences and of losses"),
        ({"held_out": held(losses=(float("nan"),))}, "a loss that is no number"),
        ({"held_out": held(labels=(2,))}, "a sequence without tokens"),
        ({"held_out": held(labels=(-1, 2))}, "negative ones"),
        ({"held_out": held(ids=(), labels=())}, "a sequence without tokens"),
    ],
)
def test_what_contradicts_itself_is_no_header(changes, message):
    with pytest.raises(ValueError, match=message):
        Content(**PARTS | changes)


def test_a_weight_that_is_computed_may_be_used_although_it_is_no_parameter():
    base = {"w.original": "1", "b": "2"}
    dtypes = dict.fromkeys(base, "float32")
    header = replace(HEADER, base=base, dtypes=dtypes, parametrised={"w": ("w.original",)})
    assert Content(**PARTS | {"header": header}).uses == USES


def test_a_header_that_no_reader_accepts_is_not_written(monkeypatch):
    text = Content(**PARTS).to_json()
    monkeypatch.setattr(module, "HEADER_LIMIT", len(text))
    assert Content(**PARTS).to_json() == text
    monkeypatch.setattr(module, "HEADER_LIMIT", len(text) - 1)
    with pytest.raises(ProfileError, match="hold less safety data out"):
        Content(**PARTS).to_json()
