"""A profile that is not as it was saved ends right or in a named error, in bounds, also where it is used."""

import shutil

import pytest

from safedelta_hf import Ridge, SafetyProfile, adjust_adapter_files
from safedelta_hf.errors import SafeDeltaError
from tests.bad_inputs import TEXTS, VALUES, contents, crossed, damages, right_or_named
from tests.fixtures import adapters, tiny
from tests.profile.saved_profiles import resign

MEGABYTES = 64


def base():
    return tiny.llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapters.profile_of(base()).save(folder / "profile", "float32")
    adapters.adapted(base()).save_pretrained(folder / "adapter")
    use(folder / "profile", folder)
    shutil.rmtree(folder / "output")
    return folder


def use(profile, folder):
    """Read all of a profile, save it again, and adjust an adapter by it."""
    loaded = SafetyProfile.load(profile)
    for key in loaded.moments:
        assert loaded.moments[key].total.shape == loaded.moments.shape(key)
    loaded.save(folder / "again")
    shutil.rmtree(folder / "again")
    return adjust_adapter_files(
        folder / "adapter", profile=loaded, output=folder / "output", rule=Ridge(strength=1.0), progress=False
    )


@pytest.fixture
def ends_well(good, tmp_path):
    def check(damage):
        profile = tmp_path / "profile"
        shutil.copytree(good / "profile", profile)
        damage(profile)
        before = contents(profile)
        found = right_or_named(lambda: use(profile, good), megabytes=MEGABYTES)
        assert contents(profile) == before
        assert (good / "output").exists() != isinstance(found, SafeDeltaError)
        shutil.rmtree(good / "output", ignore_errors=True)
        assert {path.name for path in good.iterdir()} == {"profile", "adapter"}
        return found

    return check


PATHS: list[tuple] = [
    ("header",),
    *(("header", name) for name in ("architecture", "name", "revision", "base", "dtypes", "tokenizer", "data")),
    *(("header", name) for name in ("sequences", "tokens", "skipped", "retention", "parametrised", "packed")),
    ("header", "base", "model.norm.weight"),
    ("header", "dtypes", "model.norm.weight"),
    ("uses",),
    ("uses", 0),
    *(("uses", 1, name) for name in ("parameter", "role", "moment", "view", "shape")),
    *(("uses", 1, "view", name) for name in ("start", "rows", "columns", "row_stride", "column_stride")),
    ("uses", 1, "shape", 0),
    ("held_out",),
    ("files",),
    ("moments",),
    ("moments", 0),
    *(("moments", 0, name) for name in ("key", "file", "shape", "storage", "sequences", "tokens")),
    ("moments", 0, "shape", 0),
]


def put(path, value):
    def change(content):
        *front, last = path
        for key in front:
            content = content[key]
        content[last] = value

    return lambda profile: resign(profile, change)


@pytest.mark.parametrize(("path", "value"), crossed(PATHS), ids=str)
def test_a_header_of_any_value_that_is_signed_anew(path, value, ends_well):
    ends_well(put(path, VALUES[value]))


@pytest.mark.parametrize("text", TEXTS)
def test_a_header_that_is_none(text, ends_well):
    assert isinstance(ends_well(lambda profile: (profile / "profile.json").write_bytes(TEXTS[text])), SafeDeltaError)


@pytest.mark.parametrize("name", ["profile.json", "moments"])
@pytest.mark.parametrize("number", range(0, len(list(damages(10_000))), 3))
def test_a_file_that_was_damaged(name, number, ends_well):
    def damage(profile):
        path = next(profile.glob(f"{name}*"))
        _, change = list(damages(path.stat().st_size))[number]
        path.write_bytes(change(path.read_bytes()))

    assert isinstance(ends_well(damage), SafeDeltaError)


@pytest.mark.parametrize("number", range(1, len(list(damages(10_000))), 3))
def test_a_file_that_was_damaged_and_is_signed_anew(number, ends_well):
    def damage(profile):
        path = next(profile.glob("moments*"))
        _, change = list(damages(path.stat().st_size))[number]
        path.write_bytes(change(path.read_bytes()))
        resign(profile)

    ends_well(damage)


def test_a_sparse_terabyte(ends_well):
    def damage(profile):
        path = next(profile.glob("moments*"))
        with path.open("r+b") as stream:
            stream.truncate(1 << 40)

    assert isinstance(ends_well(damage), SafeDeltaError)
