from dataclasses import replace

import pytest
import torch

from safedelta_hf import ProfileConfig, Ridge, SafeDelta, SafetyProfile, adjust_model, collect_profile, with_ordinary
from safedelta_hf.core.low_rank import dense
from safedelta_hf.errors import ConfigurationError, OutputError, ProfileError
from safedelta_hf.profile import files
from safedelta_hf.profile.files import MomentFiles
from safedelta_hf.profile.moments import Moments
from safedelta_hf.records.header import Retention
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
    monkeypatch.setattr(files, "SHARD_BYTES", 1500)
    profile.save(tmp_path / "profile", "float32")
    loaded = SafetyProfile.load(tmp_path / "profile")
    assert same_moments(loaded, profile)
    written = sorted((tmp_path / "profile").glob("moments-*"))
    assert 1 < len(written) < len(profile.moments)
    assert written[-1].name == f"moments-{len(written):05d}-of-{len(written):05d}.safetensors"


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
    with pytest.raises(ProfileError, match=r"format version 3, this package reads 5 and 6.*collect it again"):
        SafetyProfile.load(tmp_path / "profile")


def test_a_folder_of_format_5_is_read_as_it_is_and_saved_in_the_present_one(profile, tmp_path):
    profile.save(tmp_path / "profile")
    resign(tmp_path / "profile", lambda content: content["header"].update(format_version=5))
    found = SafetyProfile.load(tmp_path / "profile")
    found.save(tmp_path / "again")
    again = SafetyProfile.load(tmp_path / "again")
    assert same_moments(again, profile) and again.header.format_version == 6


def test_moments_of_few_tokens_are_stored_and_solved_as_factors(tmp_path):
    base = tiny.llama()
    config = ProfileConfig(holdout=0.0)
    profile = collect_profile(base, [{"input_ids": [3, 5], "labels": [3, 5]}], config=config, progress=False)
    profile.save(tmp_path / "few")
    found = SafetyProfile.load(tmp_path / "few")
    full = [use.moment for use in profile.uses if not use.role.is_diagonal]
    assert full and {found.moments.rank(key) for key in full} == {profile.moments.rank(key) for key in full} == {2}
    whole = {key: replace(moment, total=dense(moment.total)) for key, moment in found.moments.items()}
    weights = []
    for given in (profile, found, replace(found, moments=Moments(whole))):
        model = tiny.perturbed(tiny.llama())
        adjust_model(model, base=base, profile=given, rule=Ridge(strength=3.0), progress=False)
        weights.append(tiny.weights(model))
    for name, expected in weights[2].items():
        for one in weights[:2]:
            torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-6)


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


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def profiles():
    model = tiny.llama()
    return tuple(
        collect_profile(model, tiny.rows(count, seed=seed), config=ProfileConfig(holdout=0.0), progress=False)
        for count, seed in ((12, 1), (20, 2))
    )


def test_hessians_are_the_weighted_sum(profiles):
    safety, ordinary = profiles
    both = with_ordinary(safety, ordinary, 0.3)
    for use in safety.uses:
        expected = safety.moments[use.moment].hessian(CPU) + 0.3 * ordinary.moments[ordinary.key_of(use)].hessian(CPU)
        torch.testing.assert_close(both.moments[use.moment].hessian(CPU), expected)
    assert list(both.moments) == list(safety.moments) and len(both.moments) == len(safety.moments)


def test_the_header_says_so_and_survives_the_disk(profiles, tmp_path):
    safety, ordinary = profiles
    both = with_ordinary(safety, ordinary, 0.3)
    header = ordinary.header
    assert both.header.retention == Retention(data=header.data, sequences=20, tokens=header.tokens, weight=0.3)
    both.save(tmp_path / "both")
    loaded = SafetyProfile.load(tmp_path / "both")
    assert loaded.header == both.header
    for key, moment in both.moments.items():
        assert torch.equal(loaded.moments[key].total, moment.total)


def test_keys_need_not_be_the_same(profiles):
    safety, _ = profiles
    apart = collect_profile(
        tiny.llama(), tiny.rows(20, seed=2), config=ProfileConfig(holdout=0.0, share_moments=False), progress=False
    )
    found, expected = with_ordinary(safety, apart, 1.0), with_ordinary(safety, profiles[1], 1.0)
    for key in safety.moments:
        torch.testing.assert_close(found.moments[key].total, expected.moments[key].total)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_a_named_error(profiles, weight):
    with pytest.raises(ConfigurationError, match="weight="):
        with_ordinary(*profiles, weight)


def test_profiles_of_different_bases_are_a_named_error(profiles):
    other = collect_profile(
        tiny.perturbed(tiny.llama()), tiny.rows(4, seed=1), config=ProfileConfig(holdout=0.0), progress=False
    )
    with pytest.raises(ProfileError, match="another base"):
        with_ordinary(profiles[0], other, 0.1)
    with pytest.raises(ProfileError, match="already"):
        with_ordinary(with_ordinary(*profiles, 0.1), profiles[1], 0.1)
