"""What pyproject.toml promises to installers: bounds that `.ci/run` can test, and extras that hold what they say."""

import re
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest

from safedelta_hf.errors import ConfigurationError, extra_needed, figures_needed

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOR_USERS = sorted(set(EXTRAS) - {"all", "docs", "test", "test-lowest"})


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def extras_within(requirement):
    own = re.fullmatch(r"safedelta-hf\[([\w,-]+)\]", requirement)
    return own[1].split(",") if own else None


@pytest.mark.parametrize("extra", [None, *FOR_USERS, "test-lowest"])
def test_all_that_users_install_has_a_lower_bound_that_can_be_tested(extra):
    for requirement in PROJECT["dependencies"] if extra is None else EXTRAS[extra]:
        assert extras_within(requirement) or re.fullmatch(r"[\w.-]+(\[\w+\])?>=[\d.]+", requirement), requirement


def test_all_holds_every_extra_for_users_and_the_tests_hold_all():
    assert extras_within(EXTRAS["all"][0]) == FOR_USERS
    assert ["all", "test-lowest"] in [extras_within(requirement) for requirement in EXTRAS["test"]]


def test_what_is_imported_lazily_is_not_required():
    required = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    assert required.isdisjoint({"datasets", "deepspeed", "lm-eval", "matplotlib", "openai", "peft", "trl"})
    assert {name_of(requirement) for extra in FOR_USERS for requirement in EXTRAS[extra]}.isdisjoint(required)
    assert requires("safedelta-hf")


def test_what_is_missing_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match=r'matplotlib.*pip install -e "\.\[plot\]"'), figures_needed():
        import matplotlib  # noqa: F401
    told = r'^a LoRA needs PEFT \(.*pip install -e "\.\[peft\]"'
    with pytest.raises(ConfigurationError, match=told), extra_needed("a LoRA needs PEFT", "peft"):
        raise ImportError("none")
