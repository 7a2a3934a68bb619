"""Hundreds of profiles with something wrong: each is a ProfileError, soon, in little memory, and no wrong result."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from safedelta_hf import SafetyProfile
from safedelta_hf.core.low_rank import dense
from safedelta_hf.errors import ProfileError
from safedelta_hf.profile import files
from tests.profile.saved_profiles import STORAGES, resign, rewrite, tiny_profile

MEMORY = 32 * 2**20
"""Bytes by which opening and reading a malformed profile of some ten kilobytes may raise the peak of the process."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    parent = tmp_path_factory.mktemp("profiles")
    profile = tiny_profile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", 1000)
        for storage in STORAGES:
            profile.save(parent / storage, storage)
    return parent


@pytest.fixture
def malformed(originals, tmp_path):
    """Makes a change to a copy and says what reading it ends in."""

    def check(change, storage="triangular", match=""):
        folder = tmp_path / "copy"
        shutil.copytree(originals / storage, folder)
        try:
            change(folder)
            before = peak(reset=True)
            with pytest.raises(ProfileError, match=match):
                for moment in SafetyProfile.load(folder).moments.values():
                    assert dense(moment.total).numel()
            assert peak() - before < MEMORY
        finally:
            shutil.rmtree(folder)

    return check


def peak(*, reset=False):
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def header(folder):
    return folder / "profile.json"


def first(folder):
    return min(folder.glob("moments-*"))


def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncated(path, size):
    path.write_bytes(path.read_bytes()[:size])


def edit(path, value):
    """Set an entry of the header, and sign it again."""

    def change(folder):
        resign(folder, lambda content: put(content, path, value))

    return change


def put(content, path, value):
    *outer, last = path
    for step in outer:
        content = content[step]
    if value is MISSING:
        del content[last]
    else:
        content[last] = value(content[last]) if callable(value) else value


MISSING = object()


def test_the_originals_are_fine(originals):
    for storage in STORAGES:
        assert len(SafetyProfile.load(originals / storage).moments) == len(
            list(SafetyProfile.load(originals / storage).moments.values())
        )


def test_a_header_cut_short_anywhere(malformed, originals):
    size = header(originals / "triangular").stat().st_size
    for kept in [0, 1, *random.Random(0).sample(range(size), 38)]:
        malformed(lambda folder, kept=kept: truncated(header(folder), kept))


def test_a_bit_of_the_header_flipped_anywhere(malformed, originals):
    size = header(originals / "triangular").stat().st_size
    for bit in random.Random(1).sample(range(8 * size), 60):
        malformed(lambda folder, bit=bit: flipped(header(folder), bit))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_file_of_moments_cut_short_or_with_a_bit_flipped_anywhere(malformed, originals, storage):
    rng = random.Random(2)
    for name in sorted(path.name for path in (originals / storage).glob("moments-*"))[:4]:
        size = (originals / storage / name).stat().st_size
        for kept in (0, 8, rng.randrange(size), size - 1):
            malformed(lambda folder, name=name, kept=kept: truncated(folder / name, kept), storage, name)
        for bit in [0, 63, *rng.sample(range(8 * size), 6)]:
            malformed(lambda folder, name=name, bit=bit: flipped(folder / name, bit), storage, name)


WRONG = {
    str: (3, [], {}, True),
    int: ("3", 1.5, None, True, -1, 10**30),
    dict: ([], "x", 3),
    list: ({}, "x", 3),
    float: ("1", [], float("nan"), float("inf"), 10**400),
    type(None): (3, []),
}


def places(content, path=()):
    """One path to every field; of lists and of mappings by name the first entry stands for all."""
    yield path, content
    if isinstance(content, list) and content:
        yield from places(content[0], (*path, 0))
    elif isinstance(content, dict):
        named = any(re.search(r"[.:]", key) for key in content)
        for key in list(content)[: 1 if named else None]:
            yield from places(content[key], (*path, key))


def test_every_field_of_another_type_missing_or_out_of_range(malformed, originals):
    content = json.loads(header(originals / "triangular").read_text())
    del content["digest"]
    changed = 0
    for path, value in places(content):
        for wrong in WRONG[type(value)] if path else ():
            malformed(edit(path, wrong))
            changed += 1
        if path and isinstance(path[-1], str) and not re.search(r"[.:]", path[-1]):
            malformed(edit(path, MISSING))
            malformed(edit((*path[:-1], "unknown"), 1))
            changed += 2
    assert changed > 150


FILE = ("moments", 0, "file")
VIEW = {"start": 0, "rows": 2, "columns": 2, "row_stride": 2, "column_stride": 1}


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("header", "format_version"), 1, "format version 1"),
        (("header", "format_version"), 2, "format version 2"),
        (("header", "format_version"), 3, "format version 3, this package reads 5 and 6"),
        (("header", "format_version"), 99, "format version 99"),
        (("header", "format_version"), "6", "format version 6"),
        (("moments", 0, "shape"), [], "shape"),
        (("moments", 0, "shape"), [16, 16, 16], "shape"),
        (("moments", 0, "shape"), [0], "shape"),
        (("moments", 0, "shape"), [-48], "shape"),
        (("moments", 0, "shape"), [47], "not Layout"),
        (("moments", 0, "shape"), [10**12], "shape"),
        (("moments", 0, "shape"), [2**30], "need"),
        (("moments", 0, "shape"), [48, 47], "shape"),
        (("moments", 0, "shape"), [4, 4], "cannot be|another kind"),
        (("moments", 2, "shape"), [2**20, 2**20], "shape"),
        (("moments", 2, "shape"), [2**16, 2**16], "need|another kind"),
        (("moments", 0, "storage"), "triangular", "diagonal"),
        (("moments", 0, "storage"), "pickle", "storage="),
        (("moments", 0, "storage"), "eigenbasis:-1", "storage="),
        (("moments", 0, "storage"), "float32:3", "storage="),
        (("moments", 0, "sequences"), 13, "sequences"),
        (("moments", 0, "sequences"), 0, "sequences"),
        (("header", "sequences"), 0, "sequences"),
        (("moments", 0, "tokens"), -1, "tokens"),
        (("moments", 0, "key"), "another", "does not hold"),
        (("moments", 0), lambda moment: {**moment, "key": "transformer.h.0.ln_1.weight:norm"}, "same key|hold"),
        (("moments",), lambda moments: moments[1:], "hold|other tensors"),
        (("moments",), lambda moments: [*moments, moments[0]], "same key"),
        (("moments",), [], "go together"),
        (("files",), lambda files: dict(list(files.items())[1:]), "go together"),
        (("files",), {}, "go together"),
        (("uses", 0, "moment"), "another", "does not hold"),
        (("uses", 0, "parameter"), "another", "no parameter"),
        (("uses", 0, "role"), "magic", "magic"),
        (("uses", 0, "shape"), [], "not fit"),
        (("uses", 0, "shape"), [1, 16], "not fit"),
        (("uses", 0, "shape"), [-48, -16], "not fit"),
        (("uses", 0, "role"), "linear", "another kind"),
        *(
            (("uses", 0, "view"), {**VIEW, name: number}, message)
            for name in VIEW
            for number, message in ((-1, "negative"), (0, "without rows"), (2**48, "not fit"), (2**62, "not fit"))
            if (name, number) != ("start", 0)
        ),
        (("held_out", "losses"), lambda losses: losses[1:], "held_out"),
        (("held_out", "sequences", 0, "labels"), [1], "held_out"),
        (("held_out", "sequences", 0, "input_ids"), [], "held_out"),
    ],
)
def test_an_impossible_header_that_is_signed(malformed, path, value, match):
    malformed(edit(path, value), match=match)


@pytest.mark.parametrize(
    "name",
    [
        "../profile.json",
        "../../../../etc/passwd",
        "/etc/passwd",
        "sub/moments-00001-of-00001.safetensors",
        "./moments-00001-of-00001.safetensors",
        "moments-00001-of-00001.safetensors/../x",
        "moments-00001-of-00001.safetensors\n",
        "moments-00001-of-00001.safetensors\0",
        "moments-1-of-1.safetensors",
        "moments-00001-of-00001.bin",
        "moments-٠٠٠٠١-of-00001.safetensors",
        "~/moments-00001-of-00001.safetensors",
        "C:\\moments-00001-of-00001.safetensors",
        "profile.json",
        ".",
        "..",
        "",
    ],
)
def test_a_file_name_that_is_none_of_ours(malformed, name):
    def change(content):
        old = content["moments"][0]["file"]
        content["files"][name] = content["files"].pop(old)
        for moment in content["moments"]:
            moment["file"] = name if moment["file"] == old else moment["file"]

    malformed(lambda folder: resign(folder, change), match="no name of a file")


def outside(folder, name):
    """Somewhere else, with the right bytes."""
    target = folder.parent / f"outside-{name}"
    shutil.move(folder / name, target)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: first(folder).symlink_to(outside(folder, first(folder).name)),
        lambda folder: (folder / "moments-00099-of-00099.safetensors").write_bytes(b""),
        lambda folder: shutil.copy(first(folder), folder / "moments-00000-of-00002.safetensors"),
        lambda folder: first(folder).unlink(),
        lambda folder: [path.unlink() for path in folder.glob("moments-*")],
        lambda folder: header(folder).unlink(),
        lambda folder: first(folder).rename(first(folder).with_suffix(".bin")),
        lambda folder: replaced(folder, Path.mkdir),
        lambda folder: replaced(folder, os.mkfifo),
        lambda folder: replaced(folder, lambda path: path.symlink_to("/dev/zero")),
        lambda folder: replaced(folder, lambda path: path.symlink_to(path.name)),
        lambda folder: replaced(folder, lambda path: path.symlink_to("absent")),
        lambda folder: replaced(folder, lambda path: path.symlink_to(header(folder))),
        lambda folder: replaced(folder, lambda path: shutil.copy(max(folder.glob("moments-*")), path)),
        lambda folder: [header(folder).unlink(), header(folder).mkdir()],
        lambda folder: [header(folder).unlink(), os.mkfifo(header(folder))],
        lambda folder: grown(header(folder), 2**38),
        lambda folder: grown(first(folder), 2**38),
        lambda folder: header(folder).write_bytes(b"\xff\xfe\x00"),
        lambda folder: header(folder).write_text("[" * 100_000),
        lambda folder: header(folder).write_text('{"header":' * 100_000),
        lambda folder: header(folder).write_text("9" * 100_000),
        lambda folder: header(folder).write_text("null"),
        lambda folder: header(folder).write_text("[]"),
        lambda folder: header(folder).write_text("{}"),
        lambda folder: header(folder).write_text('{"header": {"format_version": 6}}'),
        edit(("header", "architecture"), "\ud800"),
        edit(("header", "skipped"), {"\ud800": "x"}),
    ],
)
def test_a_folder_that_is_not_as_it_was_written(malformed, change):
    malformed(change)


def replaced(folder, make):
    path = first(folder)
    path.unlink()
    make(path)


def grown(path, size):
    with path.open("ab") as file:
        file.truncate(size)  # a hole: it takes no room


def some(tensors, part):
    return next(name for name in tensors if name.endswith(part))


def changed(part, change):
    def apply(tensors):
        name = some(tensors, part)
        tensors[name] = change(tensors[name].clone())

    return apply


def filled(*place, value):
    def change(tensor):
        tensor[place] = value
        return tensor

    return change


PARTS = [("float32", "total"), ("triangular", "upper"), ("bfloat16", "factor")]
PARTS += [("eigenbasis:3", part) for part in ("vectors", "values", "rest")]
CHANGES = {
    "NaN": filled(1, value=float("nan")),
    "Inf": filled(1, value=float("inf")),
    "dtype": lambda tensor: tensor.to(torch.float64),
    "integers": lambda tensor: tensor.to(torch.int32),
    "longer": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "shorter": lambda tensor: tensor[:-1].clone(),
    "scalar": lambda tensor: tensor.flatten()[0].clone(),
    "other dimensions": lambda tensor: tensor[None].clone(),
}


@pytest.mark.parametrize(("storage", "part"), PARTS)
def test_signed_tensors_that_cannot_be(malformed, storage, part):
    for change in CHANGES.values():
        malformed(lambda folder, change=change: rewrite(folder, changed(part, change)), storage)
    malformed(lambda folder: rewrite(folder, lambda tensors: tensors.pop(some(tensors, part))), storage)
    malformed(lambda folder: rewrite(folder, lambda tensors: tensors.update(x=torch.ones(1))), storage)


@pytest.mark.parametrize(
    ("storage", "part", "change"),
    [
        ("float32", "total", filled(0, 0, value=-1.0)),
        ("float32", "total", filled(0, 1, value=1e6)),
        ("float32", "total", lambda total: total + torch.triu(total.abs().mean() * torch.ones_like(total), 1)),
        ("float32", "total", lambda total: -total),
        ("triangular", "upper", filled(0, value=-1.0)),
        ("triangular", "upper", filled(1, value=1e6)),
        ("triangular", "upper", lambda upper: -upper),
        ("eigenbasis:3", "rest", filled(0, value=-1e9)),
        ("eigenbasis:3", "values", lambda values: -values),
    ],
)
def test_signed_values_that_no_sum_of_products_has(malformed, storage, part, change):
    malformed(lambda folder: rewrite(folder, changed(part, change)), storage, "moment")


def written(folder, data):
    first(folder).write_bytes(data)
    resign(folder)


def with_head(folder, head, length=None):
    head = json.dumps(head).encode()
    written(folder, (len(head) if length is None else length).to_bytes(8, "little") + head + bytes(4096))


@pytest.mark.parametrize("length", [0, 1, 2**20, 10**8, 10**12, 2**63, 2**64 - 1])
def test_a_signed_file_whose_own_header_claims_any_length(malformed, length):
    malformed(lambda folder: with_head(folder, {}, length))


@pytest.mark.parametrize(
    "described",
    [
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]},
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]},
        {"dtype": "F32", "shape": [1024], "data_offsets": [0, 4096]},
        {"dtype": "F32", "shape": [1024], "data_offsets": [4096, 0]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4096]},
        {"dtype": "F99", "shape": [1024], "data_offsets": [0, 4096]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4096]},
        {"dtype": "F32"},
        [],
        None,
    ],
)
def test_a_signed_file_that_declares_huge_or_impossible_tensors(malformed, originals, described):
    moments = json.loads(header(originals / "float32").read_text())["moments"]
    names = [f"{moment['key']}/total" for moment in moments if moment["file"] == moments[0]["file"]]
    malformed(lambda folder: with_head(folder, dict.fromkeys(names, described)), "float32")


@pytest.mark.parametrize("place", ["version", "unknown", "sequences"])
def test_a_header_that_is_nested_as_deep_as_can_be_read(malformed, place):
    def change(folder, depth):
        nested = "[" * depth + "]" * depth
        text = header(folder).read_text()
        changed = {
            "version": text.replace('"format_version": 6', f'"format_version": {nested}'),
            "unknown": text.removesuffix("}") + f', "unknown": {nested}}}',
            "sequences": text.replace('"sequences": 12', f'"sequences": {nested}'),
        }[place]
        assert changed != text
        header(folder).write_text(changed)

    # Somewhere between these depths one step of the reader after the other reaches its limit.
    for depth in range(300, 1100, 25):
        malformed(lambda folder, depth=depth: change(folder, depth), match="nested|digest|format version")


def test_files_that_were_swapped(malformed):
    def swap(folder):
        one, *_, other = sorted(folder.glob("moments-*"), key=lambda path: path.stat().st_size)
        data = one.read_bytes(), other.read_bytes()
        other.write_bytes(data[0])
        one.write_bytes(data[1])

    malformed(swap)


def test_a_file_that_is_damaged_after_it_was_read_is_found_when_it_is_read_again(originals, tmp_path):
    shutil.copytree(originals / "triangular", tmp_path / "copy")
    profile = SafetyProfile.load(tmp_path / "copy")
    key = next(iter(profile.moments))
    assert profile.moments[key].tokens
    flipped(first(tmp_path / "copy"), 8 * 700)
    with pytest.raises(ProfileError, match="damaged or swapped"):
        profile.moments[key]


def test_the_values_of_a_moment_are_checked_when_it_is_first_read_and_those_of_its_digest_stay_the_same(
    originals, monkeypatch
):
    checked = []
    genuine = files.require_moment
    monkeypatch.setattr(files, "require_moment", lambda total, key: checked.append(key) or genuine(total, key))
    profile = SafetyProfile.load(originals / "triangular")
    for _ in range(3):
        for key in profile.moments:
            profile.moments[key]
    assert checked == list(profile.moments)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_one_entry_that_no_sum_of_products_has_is_found_wherever_it_stands(size):
    generator = torch.Generator().manual_seed(size)
    inputs = torch.randn(2 * size, size, generator=generator)
    moment = inputs.T @ inputs
    files.require_moment(moment, "intact")
    for row, column in {(0, size - 1), (size - 1, 0), (size // 2, size // 3), (size - 1, size - 1)}:
        for value in (float("nan"), float("inf"), -1e9, 1e9 if row != column else -1.0):
            spoilt = moment.clone()
            spoilt[row, column] = value
            with pytest.raises(ValueError, match="spoilt"):
                files.require_moment(spoilt, "spoilt")
