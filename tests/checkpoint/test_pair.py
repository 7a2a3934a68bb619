"""Weights are found in files, and put back there, whatever transformers makes of them when it saves."""

import pytest
import torch

from safedelta_hf.checkpoint.pair import CheckpointPair
from safedelta_hf.errors import CheckpointError
from safedelta_hf.modules.names import parameter_names
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.weights import stored
from safedelta_hf.weights.safetensors_files import SafetensorsFiles
from tests.fixtures import architectures

REFUSED = ("hrm_text", "inkling2_text", "inkling2_loop_text", "lara_mini", "sarvam_moe")
"""Saved in a way that permutes the entries of weights, or puts several into one."""

KINDS = {
    "llama": False,
    "camembert": True,
    "gpt_neox": True,
    "gemma3": True,
    "deepseek_v4": True,
    "granitemoe": True,
    "nemotron_h": True,
    "bailing_hybrid": True,
}
"""Architectures, and whether their files name or split any weight otherwise than the model does."""


def header_of(model):
    dtypes = {name: str(weight.dtype).removeprefix("torch.") for weight, name in parameter_names(model).items()}
    return ProfileHeader(
        architecture=type(model).__name__,
        base=dict.fromkeys(dtypes, ""),
        dtypes=dtypes,
        tokenizer=None,
        data="",
        sequences=1,
        tokens=1,
        skipped={},
    )


def assert_found(key, folder):
    """Returns whether any weight is stored otherwise than in the model."""
    model = architectures.tiny_model(key)
    model.save_pretrained(folder, max_shard_size="50KB")
    weights = {name: parameter.detach() for parameter, name in parameter_names(model).items()}
    header = header_of(model)
    files = SafetensorsFiles(folder)
    if key in REFUSED:
        with pytest.raises(CheckpointError, match="save_original_format=False"):
            CheckpointPair(files, files, header)
        return True
    pair = CheckpointPair(files, files, header)
    written = {}
    for name, weight in weights.items():
        assert torch.equal(pair.read(name), weight) and torch.equal(pair.base.read(name), weight)
        written |= dict(pair.split(name, weight.contiguous()))
    assert written.keys() | pair.others.keys() == files.tensors.keys() and not written.keys() & pair.others.keys()
    assert all(torch.equal(value, files.read(name)) for name, value in written.items())
    return not written.keys() <= weights.keys()


@pytest.mark.parametrize("key", [*KINDS, *REFUSED])
def test_weights_are_found_and_put_back_as_transformers_saves_them(key, tmp_path):
    assert assert_found(key, tmp_path) == KINDS.get(key, True)


@pytest.mark.slow
@pytest.mark.parametrize("key", architectures.KEYS)
def test_weights_of_every_architecture_are_found_and_put_back(key, tmp_path):
    try:
        architectures.tiny_model(key)
    except Exception as error:
        pytest.skip(f"no tiny model: {error}")
    assert_found(key, tmp_path)


@pytest.mark.parametrize("lost", ["one tensor", "all tensors"])
def test_a_layout_that_does_not_cover_a_parameter_is_refused(lost, tmp_path, monkeypatch):
    model = architectures.tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    revert = stored.revert_weight_conversion

    def incomplete(*values):
        saved = revert(*values)
        experts = [name for name in saved if ".experts." in name]
        for name in experts[:1] if lost == "one tensor" else experts:
            del saved[name]
        return saved

    files, header = SafetensorsFiles(tmp_path), header_of(model)
    CheckpointPair(files, files, header)
    monkeypatch.setattr(stored, "revert_weight_conversion", incomplete)
    with pytest.raises(CheckpointError, match=r"experts.*transformers saves \d+ of its \d+ entries"):
        CheckpointPair(files, files, header)
