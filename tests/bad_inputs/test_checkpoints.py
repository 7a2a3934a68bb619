"""A model in files that is not as it was saved ends right or in a named error, in bounds; what malforms a header alone
is in tests/checkpoint/test_malformed.py."""

import json
import shutil

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from safedelta_hf import Ridge, adjust_checkpoint
from safedelta_hf.errors import SafeDeltaError
from tests.bad_inputs import TEXTS, VALUES, contents, crossed, damages, right_or_named
from tests.fixtures import adapters, tiny

MEGABYTES = 128
CONFIG, TENSORS = "config.json", "model.safetensors"


def mixture(seed=0):
    """Its experts stand in files one by one, so that configuration and class tell how they were saved."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=32)).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapters.profile_of(mixture()).save(folder / "profile")
    mixture().save_pretrained(folder / "base")
    tiny.perturbed(mixture()).save_pretrained(folder / "tuned")
    adjust(folder, folder / "output")
    shutil.rmtree(folder / "output")
    return folder


def adjust(folder, output):
    paths = {name: folder / name for name in ("base", "tuned", "profile")}
    return adjust_checkpoint(**paths, output=output, rule=Ridge(strength=1.0), progress=False)


@pytest.fixture
def ends_well(good, tmp_path):
    def check(damage, name="tuned"):
        for one in ("base", "tuned", "profile"):
            shutil.copytree(good / one, tmp_path / one)
        damage(tmp_path / name)
        before = contents(tmp_path / name)
        found = right_or_named(lambda: adjust(tmp_path, tmp_path / "output"), megabytes=MEGABYTES)
        assert contents(tmp_path / name) == before
        assert (tmp_path / "output").exists() != isinstance(found, SafeDeltaError)
        return found

    return check


def setting(name, value):
    def damage(model):
        settings = json.loads((model / CONFIG).read_text())
        (model / CONFIG).write_text(json.dumps(settings | {name: value}))

    return damage


SETTINGS = sorted(
    name for name in MixtralConfig().to_dict() if any(part in name for part in ("num", "size", "dim", "type", "rope"))
)


@pytest.mark.parametrize(("name", "value"), crossed(SETTINGS))
def test_a_setting_of_any_value(name, value, ends_well):
    ends_well(setting(name, VALUES[value]))


@pytest.mark.parametrize("name", ["num_local_experts", "num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("folder", ["base", "tuned"])
def test_a_number_of_parts_that_the_files_do_not_hold_is_refused_before_anything_is_built(name, folder, ends_well):
    found = ends_well(setting(name, 10**8), folder)
    assert isinstance(found, SafeDeltaError) and f"config.json speaks of {name}=100000000" in str(found)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [CONFIG, "model.safetensors.index.json", TENSORS, "generation_config.json"])
def test_a_file_that_is_none(name, text, ends_well):
    ends_well(lambda model: (model / name).write_bytes(TEXTS[text]))


@pytest.mark.parametrize("folder", ["base", "tuned"])
@pytest.mark.parametrize("number", range(0, len(list(damages(10_000))), 3))
def test_a_file_that_was_damaged(folder, number, ends_well):
    def damage(model):
        path = model / TENSORS
        _, change = list(damages(path.stat().st_size))[number]
        path.write_bytes(change(path.read_bytes()))

    ends_well(damage, folder)
