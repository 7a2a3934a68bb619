import pytest
import torch

from safedelta_hf import ProfileConfig, SafeDelta, SafetyProfile, adjust_model, collect_profile
from safedelta_hf.errors import ConfigurationError, OutputError, ProfileError
from safedelta_hf.profile import shards
from safedelta_hf.profile.reader import MomentFiles
from tests.fixtures import tiny
from tests.profile.saved_profiles import STORAGES, contents, resign, same_moments, tiny_profile


@pytest.fixture(scope="module")
def profile():
    return tiny_profile()


@pytest.mark.parametrize("storage", ["float32", "triangular"])
def test_exact_storage_survives_the_disk_bit_for_bit(profile, tmp_path, storage):
    profile.save(tmp_path / "profile", storage)
    assert same_moments(SafetyProfile.load(tmp_path / "profile"), profile)


@pytest.mark.parametrize("storage", STORAGES)
def test_shapes_and_keys_are_known_without_reading(profile, tmp_path, storage, monkeypatch):
    profile.save(tmp_path / "profile", storage)
    loaded = SafetyProfile.load(tmp_path / "profile")
    monkeypatch.setattr(MomentFiles, "__getitem__", lambda *_: pytest.fail("a moment was read"))
    assert {key: loaded.moments.shape(key) for key in loaded.moments} == {
        key: tuple(moment.total.shape) for key, moment in profile.moments.items()
    }
    assert all(key in loaded.moments for key in profile.moments) and "other" not in loaded.moments


@pytest.mark.parametrize("storage", STORAGES)
def test_what_was_read_from_any_storage_can_be_saved_exactly(tmp_path, profile, storage):
    profile.save(tmp_path / "one", storage)
    SafetyProfile.load(tmp_path / "one").save(tmp_path / "two", "triangular")
    again = SafetyProfile.load(tmp_path / "two")
    assert same_moments(again, SafetyProfile.load(tmp_path / "one"))


def test_small_moments_share_files_and_large_ones_do_not(profile, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1500)
    profile.save(tmp_path / "profile", "float32")
    loaded = SafetyProfile.load(tmp_path / "profile")
    assert same_moments(loaded, profile)
    files = sorted((tmp_path / "profile").glob("moments-*"))
    assert 1 < len(files) < len(profile.moments)
    assert files[-1].name == f"moments-{len(files):05d}-of-{len(files):05d}.safetensors"


def test_an_existing_folder_is_not_overwritten(profile, tmp_path):
    profile.save(tmp_path / "profile")
    before = contents(tmp_path / "profile")
    with pytest.raises(OutputError, match="exists already"):
        profile.save(tmp_path / "profile", "float32")
    assert contents(tmp_path / "profile") == before


def test_an_unknown_storage_is_a_named_error_before_anything_is_written(profile, tmp_path):
    for storage in ("float64", "eigenbasis", "eigenbasis:0", "eigenbasis:x", "triangular:2", None):
        with pytest.raises(ConfigurationError, match=r"storage=|rank="):
            profile.save(tmp_path / "profile", storage)
    assert not list(tmp_path.iterdir())


def test_a_moment_that_cannot_be_one_is_not_saved(tmp_path):
    profile = tiny_profile()
    next(iter(profile.moments.values())).total[0] = float("nan")
    with pytest.raises(ProfileError, match="NaN"):
        profile.save(tmp_path / "profile")
    assert not (tmp_path / "profile").exists()


def test_a_folder_without_header_is_no_profile(tmp_path):
    with pytest.raises(ProfileError, match=r"holds no profile\.json"):
        SafetyProfile.load(tmp_path)
    with pytest.raises(ProfileError, match="there is no folder"):
        SafetyProfile.load(tmp_path / "absent")


def test_an_older_format_says_to_collect_again(profile, tmp_path):
    profile.save(tmp_path / "profile")
    resign(tmp_path / "profile", lambda content: content["header"].update(format_version=3))
    with pytest.raises(ProfileError, match=r"format version 3, this package reads 4.*collect it again"):
        SafetyProfile.load(tmp_path / "profile")


def test_a_profile_from_disk_adjusts_as_the_one_in_memory(tmp_path):
    base = tiny.llama()
    profile = collect_profile(base, tiny.rows(12, seed=1), config=ProfileConfig(holdout=0.0), progress=False)
    profile.save(tmp_path / "profile")
    models = []
    for given in (profile, SafetyProfile.load(tmp_path / "profile")):
        models.append(tiny.perturbed(tiny.llama()))
        adjust_model(models[-1], base=base, profile=given, rule=SafeDelta(strength=10.0), progress=False)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
