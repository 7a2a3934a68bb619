import json

import pytest
import torch

from safedelta_hf import SafetyProfile, collect_profile
from safedelta_hf.errors import OutputError
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
    with pytest.raises(OutputError, match="exists already"):
        profile.save(saved)
    assert sorted((path.name, path.read_bytes()) for path in saved.iterdir()) == before
