import pytest
import torch

from safedelta_hf import ProfileConfig, SafetyProfile, collect_profile, with_retention
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.records import Retention
from tests.fixtures import tiny

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
    both = with_retention(safety, ordinary, 0.3)
    for use in safety.uses:
        expected = safety.moments[use.moment].hessian(CPU) + 0.3 * ordinary.moments[ordinary.key_of(use)].hessian(CPU)
        torch.testing.assert_close(both.moments[use.moment].hessian(CPU), expected)
    assert list(both.moments) == list(safety.moments) and len(both.moments) == len(safety.moments)


def test_the_header_says_so_and_survives_the_disk(profiles, tmp_path):
    safety, ordinary = profiles
    both = with_retention(safety, ordinary, 0.3)
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
    found, expected = with_retention(safety, apart, 1.0), with_retention(safety, profiles[1], 1.0)
    for key in safety.moments:
        torch.testing.assert_close(found.moments[key].total, expected.moments[key].total)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_a_named_error(profiles, weight):
    with pytest.raises(ConfigurationError, match="weight="):
        with_retention(*profiles, weight)


def test_profiles_of_different_bases_are_a_named_error(profiles):
    other = collect_profile(
        tiny.perturbed(tiny.llama()), tiny.rows(4, seed=1), config=ProfileConfig(holdout=0.0), progress=False
    )
    with pytest.raises(ProfileError, match="another base"):
        with_retention(profiles[0], other, 0.1)
    with pytest.raises(ProfileError, match="already"):
        with_retention(with_retention(*profiles, 0.1), profiles[1], 0.1)
