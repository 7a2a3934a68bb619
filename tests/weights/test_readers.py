import shutil
from dataclasses import replace

import pytest
import torch

from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import BaseWeightsError
from safedelta_hf.weights.digest import digest, fingerprint
from safedelta_hf.weights.readers import (
    Comparison,
    FilesOrCopies,
    FilesReader,
    ModelReader,
    compared,
    open_base,
    verified,
)
from tests.fixtures import by_hand, tiny
from tests.fixtures.tiny import loaded


def test_files_give_the_weights_of_the_model(folder):
    model = loaded(folder)
    base = open_base(folder, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(base.read(name), parameter)


def test_sharded_files_give_the_weights_of_the_model(tmp_path):
    tiny.llama().save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for name, parameter in tiny.llama().named_parameters():
        assert torch.equal(FilesReader(tmp_path, {}).read(name), parameter)


def test_a_tied_weight_is_found_under_its_other_name(folder):
    base = FilesReader(folder, {"lm_head.weight": ("model.embed_tokens.weight",)})
    assert torch.equal(base.read("lm_head.weight"), base.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_stand_in_files_are_not_copied(folder, dtype):
    model = loaded(folder, dtype=dtype)
    base = FilesOrCopies(open_model(model), fingerprint(open_model(model)), revision=None, avoid=None)
    assert base.copied == () and base.source == str(folder)


def test_weights_that_differ_from_the_files_are_copied(folder):
    model = loaded(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    base = FilesOrCopies(open_model(model), fingerprint(open_model(model)), revision=None, avoid=None)
    expected = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert base.copied == ("model.norm.weight",)
    assert torch.equal(base.read("model.norm.weight"), expected)


def test_frozen_weights_are_never_copied():
    model = tiny.llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    base = FilesOrCopies(open_model(model), fingerprint(open_model(model)), revision=None, avoid=None)
    assert "model.embed_tokens.weight" not in base.copied and len(base.copied) == len(list(model.parameters())) - 1
    with pytest.raises(BaseWeightsError, match="frozen"):
        base.read("model.embed_tokens.weight")


def test_files_in_the_output_folder_are_not_relied_on(folder):
    model = loaded(folder)
    base = FilesOrCopies(open_model(model), fingerprint(open_model(model)), revision=None, avoid=folder)
    assert len(base.copied) == len(list(model.parameters()))


def test_files_that_changed_meanwhile_are_noticed(folder):
    model = loaded(folder)
    digests = fingerprint(open_model(model))
    base = FilesOrCopies(open_model(model), digests, revision=None, avoid=None)
    tiny.perturbed(loaded(folder)).save_pretrained(folder)
    with pytest.raises(BaseWeightsError, match="were the files changed"):
        verified(base, "model.norm.weight", "float32", digests["model.norm.weight"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "no folder"])
def test_unreadable_files_are_a_named_error(folder, damage):
    if damage == "missing":
        (folder / "model.safetensors").unlink()
    elif damage == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    else:
        shutil.rmtree(folder)
    with pytest.raises(BaseWeightsError, match="base: "):
        FilesReader(folder, {})


def test_a_weight_that_is_not_there_is_a_named_error(folder):
    with pytest.raises(BaseWeightsError, match=r"^model\.extra\.weight: "):
        FilesReader(folder, {}).read("model.extra.weight")
    with pytest.raises(BaseWeightsError, match=r"^model\.extra\.weight: "):
        ModelReader(tiny.llama()).read("model.extra.weight")


def test_digests_tell_value_shape_and_dtype_apart():
    one = torch.ones(4)
    others = [torch.zeros(4), torch.ones(2, 2), torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.int32)]
    assert digest(one) == digest(torch.ones(8)[::2])
    assert len({digest(tensor) for tensor in [one, *others]}) == 5


@pytest.mark.parametrize("held", ["in memory", "in files", "in files of another type"])
def test_all_weights_are_compared_and_the_first_that_differs_is_named(held, folder):
    base = loaded(folder)
    header = by_hand.header_of(base=fingerprint(open_model(base)), dtypes=open_model(base).data_types)
    if held == "in files of another type":
        base.double().save_pretrained(folder)

    def reader():
        return ModelReader(base) if held == "in memory" else FilesReader(folder, {})

    assert compared(reader(), header) == Comparison(len(header.base), None)
    assert compared(reader(), replace(header, packed=("model.norm.weight",))).compared == len(header.base) - 1
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    base.save_pretrained(folder)
    found = compared(reader(), header)
    assert found.differing == "model.layers.1.mlp.up_proj.weight" and 0 < found.compared < len(header.base)
    strangers = by_hand.header_of(base={"up.weight": ""}, dtypes={"up.weight": "float32"})
    assert compared(reader(), strangers) == Comparison(0, None)
