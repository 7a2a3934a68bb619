"""Whatever is wrong with the files of a checkpoint ends in a named error, and takes no memory on the way."""

import json
import random
import resource
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest

from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.weights.safetensors_files import LARGEST_INDEX
from tests.fixtures import checkpoints, tiny
from tests.fixtures.checkpoints import contents, tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

ALLOWANCE = 32 << 20
"""Bytes of memory that may be taken before a malformed checkpoint is refused."""

REMEDIES = (
    "give ",
    "save the model",
    "save it again",
    "remove ",
    "is the file complete",
    "is the checkpoint complete",
    "Collect a profile",
    "collect a profile",
    "Pass base=",
    "was the vocabulary resized after the profile was made",
)

EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@contextmanager
def limited_memory():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(fields["VmData"].split()[0]) * 1024 + ALLOWANCE
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def split(path):
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:start], content[start:]


def joined(path, header, data, length=None):
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


# Each of these takes the path of a safetensors file that holds a whole model.


def truncated(share):
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share) if share < 1 else int(share)])

    return damage


def declared(length):
    def damage(path):
        header, data = split(path)
        joined(path, header, data, length(len(header)))

    return damage


def replaced(header):
    def damage(path):
        joined(path, header, split(path)[1])

    return damage


def entry(name=UP, /, **values):
    """Say something else of one tensor; None leaves it out."""

    def damage(path):
        header, data = split(path)
        content = json.loads(header)
        told = {key: value(content[name][key]) if callable(value) else value for key, value in values.items()}
        content[name] = {key: value for key, value in (content[name] | told).items() if value is not None}
        joined(path, json.dumps(content).encode(), data)

    return damage


def named(change):
    def damage(path):
        header, data = split(path)
        content = json.loads(header)
        change(content)
        joined(path, json.dumps(content).encode(), data)

    return damage


def moved(old, new):
    return named(lambda content: content.__setitem__(new, content.pop(old)))


def twice(path):
    header, data = split(path)
    again = json.dumps({UP: json.loads(header)[UP]}).encode()
    joined(path, again[:-1] + b"," + header[1:], data)


def sparse(path):
    """A file that is as long as its header says: a terabyte of zeros."""
    header, data = split(path)
    content = json.loads(header)
    end = max(one["data_offsets"][1] for name, one in content.items() if name != "__metadata__")
    content["huge"] = {"dtype": "F32", "shape": [1 << 38], "data_offsets": [end, end + (1 << 40)]}
    joined(path, json.dumps(content).encode(), data)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + (1 << 40))


def grown(path):
    path.write_bytes(path.read_bytes() + bytes(64))


def as_folder(path):
    path.unlink()
    path.mkdir()


def linked_to_itself(path):
    path.unlink()
    path.symlink_to(path)


HEADERS = {
    **{f"cut to {n} bytes": truncated(n) for n in (1, 7, 8, 9, 16, 100, 500, 1000, 1500, 1900)},
    **{f"cut at {n:.0%}": truncated(n / 40) for n in range(0, 40)},
    "header length 0": declared(lambda n: 0),
    "header length 1": declared(lambda n: 1),
    "header one shorter": declared(lambda n: n - 1),
    "header one longer": declared(lambda n: n + 1),
    "header eight longer": declared(lambda n: n + 8),
    **{f"header length 2**{n}": declared(lambda _, n=n: (1 << n) - 1) for n in (16, 20, 26, 31, 32, 40, 62, 63, 64)},
    **{
        f"header {name}": replaced(header)
        for name, header in {
            "empty": b"",
            "null": b"null",
            "list": b"[]",
            "number": b"3",
            "string": b'"model"',
            "of no tensors": b"{}",
            "open": b"{",
            "nan": b'{"a": NaN}',
            "deep": b"[" * 200_000,
            "deep in a tensor": b'{"a": {"dtype": "F32", "shape": ' + b"[" * 200_000,
            "binary": bytes(range(256)),
            "not utf-8": b'{"\xff": 1}',
            "null tensor": b'{"a": null}',
            "list tensor": b'{"a": []}',
            "empty tensor": b'{"a": {}}',
            "metadata alone": b'{"__metadata__": {"format": "pt"}}',
        }.items()
    },
    **{
        f"dtype {dtype}": entry(dtype=dtype)
        for dtype in ("F33", "f32", "float32", "", 3, [], "I64", "F64", "I32", "U32", "F16", "BF16", "BOOL", "F8_E4M3")
    },
    "no dtype": entry(dtype=None),
    **{
        f"shape {shape}": entry(shape=shape)
        for shape in (
            [16, 24],
            [384],
            [24, 16, 1],
            [1, 24, 16],
            [24, 4, 4],
            [],
            [0, 16],
            [24, 17],
            [-24, -16],
            [24.0, 16],
            ["24", "16"],
            [1 << 62, 4],
            [1 << 40, 1 << 40],
            [1 << 64],
            24,
            "24x16",
            {"0": 24},
        )
    },
    "no shape": entry(shape=None),
    **{
        f"offsets {name}": entry(data_offsets=change)
        for name, change in {
            "reversed": lambda at: at[::-1],
            "shifted": lambda at: [at[0] + 4, at[1] + 4],
            "early": lambda at: [at[0] - 4, at[1] - 4],
            "short": lambda at: [at[0], at[1] - 4],
            "long": lambda at: [at[0], at[1] + 4],
            "of the first": lambda at: [0, at[1] - at[0]],
            "beyond": lambda at: [1 << 40, (1 << 40) + at[1] - at[0]],
            "beyond all": lambda at: [1 << 63, (1 << 63) + at[1] - at[0]],
            "negative": lambda at: [-8, at[1] - at[0] - 8],
            "three": lambda at: [*at, at[1]],
            "one": lambda at: at[:1],
            "text": lambda at: [str(at[0]), str(at[1])],
            "null": lambda at: [None, None],
            "floating": lambda at: [float(at[0]), at[1] + 0.5],
        }.items()
    },
    "no offsets": entry(data_offsets=None),
    "a tensor left out": named(lambda content: content.pop(UP)),
    "a tensor that overlaps": named(lambda content: content.__setitem__("more", content[UP])),
    "a name of another model": moved(UP, "transformer.h.0.mlp.c_fc.weight"),
    "a name without end": moved(UP, UP[:-1]),
    "an empty name": moved(UP, ""),
    "a name with a path": moved(UP, "../" + UP),
    "a long name": moved(UP, "x" * 100_000),
    "two names exchanged": named(lambda c: c.update({UP: c[NORM], NORM: c[UP]})),
    "a name twice": twice,
    "longer than it says": grown,
    "a folder": as_folder,
    "a link to itself": linked_to_itself,
}


# Each of these takes a folder of shards with an index.


def index(change):
    def damage(folder):
        content = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(change(content) or content))

    return damage


def written(content):
    return lambda folder: (folder / INDEX).write_bytes(content)


def mapped(value, *, every=False):
    def change(content):
        names = content["weight_map"] if every else [UP]
        content["weight_map"] |= dict.fromkeys(names, value)

    return index(change)


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def exchanged(folder):
    one, other = shards(folder)[:2]
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def doubled(folder):
    content = json.loads((folder / INDEX).read_text())
    shutil.copyfile(folder / content["weight_map"][UP], folder / "copy.safetensors")
    content["weight_map"][UP] = "copy.safetensors"
    (folder / INDEX).write_text(json.dumps(content))


def sparse_index(folder):
    with (folder / INDEX).open("r+b") as stream:
        stream.truncate(LARGEST_INDEX + 1)


def named_twice(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(f'"{UP}"', f'"{UP}": "other.safetensors", "{UP}"'))


def of_shard(number, damage):
    return lambda folder: damage(shards(folder)[number])


INDICES = {
    **{
        f"index {name}": written(content)
        for name, content in {
            "empty": b"",
            "open": b"{",
            "null": b"null",
            "list": b"[]",
            "text": b'"model"',
            "without a map": b"{}",
            "of null": b'{"weight_map": null}',
            "of a list": b'{"weight_map": []}',
            "of nothing": b'{"weight_map": {}}',
            "binary": bytes(range(256)),
            "not utf-8": b'{"weight_map": {"\xff": "a"}}',
            "deep": b"[" * 200_000,
            "deep map": b'{"weight_map": ' + b'{"a":' * 200_000,
        }.items()
    },
    **{
        f"shard {value!r:.30}": mapped(value)
        for value in (
            None,
            3,
            True,
            [],
            {},
            ["model-00001-of-00002.safetensors"],
            "",
            ".",
            "..",
            "/",
            "/etc/passwd",
            "/etc/hostname",
            "../base/model.safetensors",
            "..\\base\\model.safetensors",
            "inner/model.safetensors",
            "C:\\model.safetensors",
            "a\0b",
            "x" * 5000,
            "nowhere.safetensors",
            "config.json",
            INDEX,
            SINGLE,
            "\ud800",
            "~",
        )
    },
    "every shard elsewhere": mapped("nowhere.safetensors", every=True),
    "every shard outside": mapped("../base/model.safetensors", every=True),
    "a weight left out": index(lambda content: content["weight_map"].pop(UP)),
    "a weight too many": index(lambda content: content["weight_map"].update(more=content["weight_map"][UP])),
    "a weight twice": named_twice,
    "weights in the wrong shard": index(
        lambda content: content["weight_map"].update(dict.fromkeys(content["weight_map"], content["weight_map"][UP]))
    ),
    "the map of another model": index(lambda content: {"weight_map": {"a": content["weight_map"][UP]}}),
    "index too large": sparse_index,
    "index a folder": lambda folder: as_folder(folder / INDEX),
    "index missing": lambda folder: (folder / INDEX).unlink(),
    "shards exchanged": exchanged,
    "a weight in two shards": doubled,
    "single file beside": lambda folder: shutil.copyfile(shards(folder)[0], folder / SINGLE),
    **{f"shard {number} missing": of_shard(number, Path.unlink) for number in (0, 1, -1)},
    **{f"shard {number} cut": of_shard(number, truncated(0.6)) for number in (0, 1, -1)},
    **{f"shard {number} empty": of_shard(number, truncated(0)) for number in (0, 1, -1)},
    **{f"shard {number} a folder": of_shard(number, as_folder) for number in (0, -1)},
    **{f"shard {number} of another kind": of_shard(number, replaced(b"{}")) for number in (0, -1)},
    "no files": lambda folder: [path.unlink() for path in folder.glob("model*")],
    "another format": lambda folder: [path.rename(folder / "pytorch_model.bin") for path in folder.glob("model*")],
}

FOLDERS = {"tuned": CheckpointError, "base": BaseWeightsError}

FLIPS = 40


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The same case with its checkpoints in one file and in shards, and what adjusting it gives."""
    made = {}
    for name, size in (("file", "50GB"), ("shards", "4KB")):
        folder = tmp_path_factory.mktemp(name)
        case = checkpoints.case(folder, "one layer", base_shards=size, shards=size)
        case.adjust(output=folder / "expected")
        made[name] = case
    return made


@pytest.fixture
def prepared(originals, tmp_path):
    def copy(name):
        original = originals[name]
        for part in ("base", "tuned", "profile"):
            shutil.copytree(original.folder / part, tmp_path / part)
        return checkpoints.Case(tmp_path, original.model, original.profile)

    return copy


def assert_refused(case, which):
    before = {name: path.lstat().st_mtime_ns for name in ("base", "tuned") for path in (case.folder / name).iterdir()}
    # Where base and fine-tune differ in shape, either of them may be the one that is wrong.
    with limited_memory(), pytest.raises((FOLDERS[which], BaseWeightsError)) as caught:
        case.adjust()
    message = str(caught.value)
    assert any(remedy in message for remedy in REMEDIES) and "\n" not in message, message
    assert not case.output.exists() and not case.work.exists()
    after = {name: path.lstat().st_mtime_ns for name in ("base", "tuned") for path in (case.folder / name).iterdir()}
    assert after == before


@pytest.mark.parametrize("which", FOLDERS)
@pytest.mark.parametrize("damage", HEADERS)
def test_a_malformed_file_is_refused(damage, which, prepared):
    case = prepared("file")
    HEADERS[damage](case.folder / which / SINGLE)
    assert_refused(case, which)


@pytest.mark.parametrize("which", FOLDERS)
@pytest.mark.parametrize("damage", INDICES)
def test_a_malformed_set_of_shards_is_refused(damage, which, prepared):
    case = prepared("shards")
    INDICES[damage](case.folder / which)
    assert_refused(case, which)


@pytest.mark.parametrize("which", FOLDERS)
def test_a_flipped_bit_in_a_header_is_refused_or_changes_nothing(which, prepared, originals):
    case = prepared("file")
    path = case.folder / which / SINGLE
    content, draw = path.read_bytes(), random.Random(1)
    end, refused = 8 + len(split(path)[0]), 0
    for _ in range(FLIPS):
        damaged = bytearray(content)
        damaged[draw.randrange(end)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            with limited_memory():
                case.adjust()
        except (FOLDERS[which], BaseWeightsError) as error:
            refused += 1
            assert any(remedy in str(error) for remedy in REMEDIES), error
            assert not case.output.exists() and not case.work.exists()
        else:
            assert tiny.same(tensors(case.output), tensors(originals["file"].folder / "expected"))
            shutil.rmtree(case.output)
    assert refused >= FLIPS * 0.8


def test_a_flipped_bit_in_a_base_weight_is_refused(prepared):
    case = prepared("file")
    path = case.base / SINGLE
    content, draw = path.read_bytes(), random.Random(2)
    start = 8 + len(split(path)[0])
    for _ in range(10):
        damaged = bytearray(content)
        damaged[draw.randrange(start, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert_refused(case, "base")


def test_shards_that_no_index_names_are_neither_read_nor_copied(prepared, originals):
    case = prepared("shards")
    (case.tuned / "model-00099-of-00099.safetensors").write_bytes(b"stale")
    case.adjust()
    assert contents(case.output) == contents(originals["shards"].folder / "expected")


@pytest.mark.parametrize("which", FOLDERS)
@pytest.mark.parametrize("damage", [sparse, named(lambda c: c.update(more=EMPTY))], ids=["a terabyte", "nothing"])
def test_a_tensor_that_the_profile_does_not_know_is_refused_or_not_read(damage, which, prepared, originals):
    case = prepared("file")
    damage(case.folder / which / SINGLE)
    if which == "tuned":
        assert_refused(case, which)
        return
    with limited_memory():
        case.adjust()
    assert contents(case.output) == contents(originals["file"].folder / "expected")


def test_there_are_at_least_200_variants():
    assert 2 * (len(HEADERS) + len(INDICES)) >= 200
