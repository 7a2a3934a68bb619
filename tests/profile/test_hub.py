"""Against a Hub on this machine that speaks the protocol; huggingface_hub itself is not replaced anywhere."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, constants

from safedelta_hf import SafetyProfile
from safedelta_hf.errors import ProfileError
from safedelta_hf.profile import files
from tests.fixtures.fake_hub import FILES, connected
from tests.profile.saved_profiles import same_moments, tiny_profile

NAME = "org/profile"


@pytest.fixture(scope="module")
def profile():
    return tiny_profile()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "SHARD_BYTES", 1000)
    monkeypatch.chdir(tmp_path)  # a name of a repository may be that of a folder
    with connected(monkeypatch) as found:
        yield found


def opened(tmp_path, **settings):
    return SafetyProfile.load(NAME, cache_dir=tmp_path / "cache", **settings)


def test_a_profile_survives_the_hub(profile, hub, tmp_path):
    address = profile.push_to_hub(NAME, token="hf_x", commit_message="Mine")
    assert hub.url in address and hub.messages[-1] == "Mine" and "Bearer hf_x" in hub.tokens
    assert same_moments(opened(tmp_path, token="hf_y"), profile) and "Bearer hf_y" in hub.tokens


def test_moments_are_downloaded_one_file_at_a_time_and_once(profile, hub, tmp_path):
    profile.push_to_hub(NAME)
    loaded = opened(tmp_path)
    assert hub.downloads() == ["profile.json"]
    assert {key: loaded.moments.shape(key) for key in loaded.moments}
    assert hub.downloads() == ["profile.json"]
    keys = list(loaded.moments)
    assert loaded.moments[keys[0]].tokens and loaded.moments[keys[-1]].tokens and loaded.moments[keys[0]].tokens
    assert len(hub.downloads()) == 3 == len(set(hub.downloads()))


def test_files_are_those_of_the_commit_whose_header_was_read(profile, hub, tmp_path):
    profile.push_to_hub(NAME)
    loaded = opened(tmp_path)
    profile.push_to_hub(NAME, storage="float32")
    assert same_moments(loaded, profile)


def test_a_new_profile_replaces_the_old_one_and_its_files(profile, hub, tmp_path):
    profile.push_to_hub(NAME, storage="float32")
    before = set(hub.files(NAME)[0])
    profile.push_to_hub(NAME, storage="bfloat16")
    after = hub.files(NAME)[0]
    described = json.loads(after["profile.json"])["files"]
    assert before - set(after) and set(after) == {*described, "profile.json", "README.md"}
    assert list(opened(tmp_path).moments.values())


def test_a_branch_is_made_and_read(profile, hub, tmp_path):
    profile.push_to_hub(NAME, revision="v2", private=True)
    assert set(hub.files(NAME)[0]) == set() and "profile.json" in hub.files(NAME, "v2")[0]
    assert hub.private[NAME] in (True, "private")
    assert same_moments(opened(tmp_path, revision="v2"), profile)
    with pytest.raises(ProfileError, match="holds no safety profile"):
        opened(tmp_path)


def test_the_card_says_what_it_is_and_one_that_is_there_stays(profile, hub):
    profile.push_to_hub(NAME, base_model="org/base", storage="eigenbasis:3")
    text = hub.files(NAME)[0]["README.md"].decode()
    named = replace(profile, header=replace(profile.header, name="org/its-own"))
    named.push_to_hub("org/other")
    assert ModelCard(hub.files("org/other")[0]["README.md"].decode()).data.base_model == "org/its-own"
    card = ModelCard(text)
    assert card.data.tags == ["safedelta", "safety-profile"] and card.data.base_model == "org/base"
    assert card.data.library_name == "safedelta_hf" and "12 sequences" in text and "eigenbasis:3" in text
    hub.files(NAME)[0]["README.md"] = b"my own"
    profile.push_to_hub(NAME)
    assert hub.files(NAME)[0]["README.md"] == b"my own"


def test_a_folder_of_that_name_comes_first(profile, hub, tmp_path):
    profile.save(tmp_path / "org" / "profile")
    assert same_moments(opened(tmp_path), profile) and not hub.requests


def test_a_snapshot_in_the_cache_opens_as_a_folder(profile, hub, tmp_path):
    profile.push_to_hub(NAME)
    assert len([moment for moment in opened(tmp_path).moments.values()]) == len(profile.moments)
    (header,) = (tmp_path / "cache").glob("*/snapshots/*/profile.json")
    assert same_moments(SafetyProfile.load(header.parent), profile)


@pytest.mark.parametrize("name", ["org/absent", "absent", "a/b/c", "no name at all"])
def test_what_is_not_there_is_a_named_error(hub, name):
    with pytest.raises(ProfileError, match="profile: "):
        SafetyProfile.load(name)
    assert bool(hub.requests) == (name.count("/") == 1)


def test_a_damaged_download_is_found(profile, hub, tmp_path):
    profile.push_to_hub(NAME)
    files = hub.files(NAME)[0]
    name = next(name for name in files if name.startswith("moments-"))
    files[name] = files[name][:-1] + b"?"
    with pytest.raises(ProfileError, match="damaged or swapped"):
        list(opened(tmp_path).moments.values())


def test_an_upload_that_the_hub_refuses_is_a_named_error(profile, hub):
    with pytest.raises(ProfileError, match="profile: "):
        profile.push_to_hub("no name at all")
    with pytest.raises(ProfileError, match="within reach"):
        profile.push_to_hub(NAME, revision="refs/pr/7")


def test_a_hub_that_cannot_be_reached_is_a_named_error(profile, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + FILES)
    with pytest.raises(ProfileError, match="reach"):
        opened(tmp_path)
