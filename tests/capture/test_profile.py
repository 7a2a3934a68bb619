import json

import pytest
import torch

from safedelta_hf import SafetyProfile, collect_profile
from safedelta_hf.errors import ProfileError
from tests import tiny


@pytest.fixture(scope="module")
def profile():
    return collect_profile(tiny.llama(tied=True), tiny.rows(12, seed=1), progress=False)


@pytest.fixture
def saved(profile, tmp_path):
    profile.save(tmp_path / "profile")
    return tmp_path / "profile"


def edited(saved, change):
    path = saved / "profile.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return saved


def test_a_profile_survives_the_disk(profile, saved):
    loaded = SafetyProfile.load(saved)
    assert (loaded.header, loaded.uses, list(loaded.moments)) == (profile.header, profile.uses, list(profile.moments))
    for key, moment in profile.moments.items():
        assert torch.equal(moment.total, loaded.moments[key].total)
        assert (moment.sequences, moment.tokens) == (loaded.moments[key].sequences, loaded.moments[key].tokens)


def test_an_existing_folder_is_not_overwritten(profile, saved):
    before = sorted((path.name, path.read_bytes()) for path in saved.iterdir())
    with pytest.raises(ProfileError, match="exists already"):
        profile.save(saved)
    assert sorted((path.name, path.read_bytes()) for path in saved.iterdir()) == before


def test_a_failed_save_leaves_nothing_behind(profile, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("safedelta_hf.folders.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        profile.save(tmp_path / "profile")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_header_is_no_profile(tmp_path):
    with pytest.raises(ProfileError, match=r"holds no profile\.json"):
        SafetyProfile.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["header"].update(format_version=99), "format version 99"),
        (lambda content: content.pop("uses"), "malformed"),
        (lambda content: content["header"].pop("base"), "malformed"),
        (lambda content: content["uses"][0].update(role="magic"), "malformed"),
        (lambda content: content["moments"].pop(), "does not hold"),
        (lambda content: content["moments"][0].update(file="../../secret"), "outside the folder"),
    ],
)
def test_a_malformed_header_is_a_named_error(saved, change, message):
    with pytest.raises(ProfileError, match=message):
        SafetyProfile.load(edited(saved, change))


def test_a_truncated_moment_is_a_named_error(saved):
    path = next(saved.glob("moment-*"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ProfileError, match="cannot read"):
        for moment in SafetyProfile.load(saved).moments.values():
            moment.tokens  # noqa: B018
