"""Offloaded parameters are read, written and shown as those in memory are."""

import copy
import gc
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils.modeling import get_state_dict_offloaded_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from safedelta_hf.capture.views import storage_key, weak_storage
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.offload import OffloadedModel, require_trainable
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.names import parameter_names
from tests.fixtures import tiny
from tests.fixtures.offloading import IDS, KINDS, SAVABLE, in_memory, logits, offloaded

STEPS = ("run", "watch", "write one", "write all", "copy", "hold")


def values(opened):
    return {name: opened.read(name).clone() for name in opened.all_names}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


def moved(opened, seed=7):
    """Write something else into every parameter."""
    generator = torch.Generator().manual_seed(seed)
    for name in opened.all_names:
        opened.write(name, opened.read(name) + 0.1 * torch.randn(opened.shape(name), generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_offloaded_model_reads_as_the_same_model_in_memory(kind, tied, dtype, tmp_path):
    model = offloaded(kind, tmp_path, tied=tied, dtype=dtype)
    whole = ShardedModel(in_memory(tmp_path))
    for _ in range(2):  # a forward pass leaves other placeholders behind
        opened = open_model(model)
        assert isinstance(opened, OffloadedModel)
        assert same(values(opened), values(whole))
        assert [opened.shape(name) for name in whole.all_names] == [whole.shape(name) for name in whole.all_names]
        assert {opened.dtype(name) for name in whole.all_names} == {dtype}
        assert {opened.device(name).type for name in whole.all_names} == {"cpu"}
        assert all(opened.shard(name).is_whole for name in whole.all_names)
        assert list(parameter_names(model).values()) == list(whole.all_names)
        logits(model)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_never_lost(kind, tied, tmp_path):
    model, twin = offloaded(kind, tmp_path, tied=tied), in_memory(tmp_path)
    logits(model)
    opened = open_model(model)
    moved(opened)
    moved(ShardedModel(twin))
    expected = tiny.weights(twin)
    for _ in range(2):
        assert same(values(opened), expected)
        assert torch.equal(logits(model), logits(twin))
    assert same(values(open_model(model)), expected)
    if kind in ("disk_offload", "cpu_offload"):  # accelerate itself cannot gather the others without a device map
        state = get_state_dict_offloaded_model(model)
        assert all(torch.equal(state[name], value) for name, value in twin.state_dict().items())
    if kind in SAVABLE:
        model.save_pretrained(tmp_path / "saved")
        assert same(tiny.weights(tiny.loaded(tmp_path / "saved")), expected)


@pytest.mark.parametrize("kind", ["disk_offload", "cpu_offload", "cpu_offload_with_hook", "chained hooks"])
def test_what_is_written_is_there_when_the_hooks_are_gone(kind, tmp_path):
    model, twin = offloaded(kind, tmp_path), in_memory(tmp_path)
    moved(open_model(model))
    moved(ShardedModel(twin))
    remove_hook_from_submodules(model)
    assert same(dict(model.state_dict()), dict(twin.state_dict()))


@pytest.mark.parametrize("kind", ["disk", "some on disk", "dispatched", "disk_offload"])
def test_writing_to_disk_takes_no_memory_and_changes_no_file_of_others(kind, tmp_path):
    model = offloaded(kind, tmp_path)
    before = files(tmp_path)
    opened = open_model(model)
    moved(opened)
    moved(opened)
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    own = [path for path in after if path not in before]
    assert {path.parent for path in own} == {tmp_path / "offloaded"}
    placeholders = [parameter for parameter in model.parameters() if parameter.is_meta]
    assert len(own) == len(placeholders)  # those of the first round are gone
    loaders = [module._hf_hook.weights_map.dataset for module in model.modules() if _is_offloaded(module)]
    assert loaders and all(not loader.state_dict for loader in loaders)


@given(kind=st.sampled_from(sorted(KINDS)), tied=st.booleans(), steps=st.lists(st.sampled_from(STEPS), max_size=8))
def test_whatever_happens_in_whatever_order_the_weights_are_those_of_the_model_in_memory(kind, tied, steps):
    with tempfile.TemporaryDirectory() as folder:
        model = offloaded(kind, Path(folder), tied=tied)
        twin = in_memory(Path(folder))
        opened, whole = open_model(model), ShardedModel(twin)
        for seed, step in enumerate(steps):
            if step == "run":
                assert torch.equal(logits(model), logits(twin))
            elif step == "watch":
                assert watched(model, opened) == watched(twin, whole)
            elif step == "write one":
                name = opened.all_names[seed % len(opened.all_names)]
                opened.write(name, torch.full(opened.shape(name), 0.1 * seed, dtype=torch.float64))
                whole.write(name, torch.full(whole.shape(name), 0.1 * seed, dtype=torch.float64))
            elif step == "write all":
                moved(opened, seed)
                moved(whole, seed)
            elif step == "copy":
                model = copy.deepcopy(model)
                opened = open_model(model)
            else:
                opened = open_model(model)
        assert same(values(opened), values(whole))
        assert torch.equal(logits(model), logits(twin))


def test_files_written_live_as_long_as_a_model_that_reads_them(tmp_path):
    model = offloaded("disk_offload", tmp_path)
    before = files(tmp_path)
    moved(open_model(model))
    expected = logits(model)
    twin = copy.deepcopy(model)
    del model
    gc.collect()
    assert torch.equal(logits(twin), expected)
    del twin
    gc.collect()
    assert files(tmp_path) == before


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    model = offloaded("disk", tmp_path)
    expected = logits(model)
    opened = open_model(model)
    (tmp_path / "offloaded").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="offloaded"):
        opened.write("model.norm.weight", torch.zeros(16))
    assert torch.equal(logits(model), expected)


def test_models_that_were_given_one_index_stay_apart(tmp_path):
    source = tmp_path / "model"
    tiny.llama().save_pretrained(source)
    index = {
        name: {"safetensors_file": str(source / "model.safetensors"), "weight_name": name}
        for name in tiny.llama().state_dict()
    }
    one, other = (_dispatched(source, index) for _ in range(2))
    expected = logits(other)
    moved(open_model(one))
    assert torch.equal(logits(other), expected)
    assert not torch.equal(logits(one), expected)


class Record(TorchDispatchMode):
    """The operations that are seen, and the weights among what they are given."""

    def __init__(self):
        super().__init__()
        self.names, self.seen, self.is_away = {}, [], False

    def track(self, tensor, name):
        assert not tensor.is_meta
        self.names[storage_key(tensor)] = name, weak_storage(tensor)

    def pause(self):
        assert not self.is_away
        self.is_away = True

    def resume(self):
        assert self.is_away
        self.is_away = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.is_away:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            known = [self.names[key] for value in tensors if (key := storage_key(value)) in self.names]
            names = [name for name, storage in known if not storage.expired()]
            self.seen.append((str(func), [tuple(value.shape) for value in tensors], names))
        return func(*args, **(kwargs or {}))


def watched(model, opened):
    record = Record()
    with torch.no_grad(), opened.tracked_by(record), record:
        model(input_ids=IDS)
    return record.seen


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_watcher_sees_the_operations_of_the_model_in_memory_and_no_others(kind, tied, tmp_path):
    model = offloaded(kind, tmp_path, tied=tied)
    twin = in_memory(tmp_path)
    expected = watched(twin, ShardedModel(twin))
    used = {name for _, _, names in expected for name in names}
    assert used == set(ShardedModel(twin).all_names)
    for _ in range(2):
        assert watched(model, open_model(model)) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_as_before_once_the_watcher_is_gone(kind, tmp_path):
    model = offloaded(kind, tmp_path)
    opened = open_model(model)
    placeholders = {name: opened.live(name) for name in opened.all_names}
    expected = logits(model)
    before = _hooks(model)
    with pytest.raises(ZeroDivisionError), opened.tracked_by(Record()):
        logits(model)
        raise ZeroDivisionError
    assert _hooks(model) == before
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {name for name in placeholders if not opened.live(name).is_meta} == {
        name for name, parameter in placeholders.items() if not parameter.is_meta
    }
    assert torch.equal(logits(model), expected)


def test_parts_of_a_model_that_is_not_of_transformers_are_read_and_written():
    model = tiny.Plain()
    twin = copy.deepcopy(model)
    cpu_offload(model)
    opened, whole = open_model(model), ShardedModel(twin)
    assert same(values(opened), values(whole))
    moved(opened)
    moved(whole)
    with torch.no_grad():
        assert torch.equal(model(IDS)["logits"], twin(IDS)["logits"])


def test_ties_that_nobody_declares_are_found_where_the_weights_are_kept():
    model = tiny.Plain()
    model.down = nn.Linear(8, tiny.VOCABULARY)
    model.up = nn.Linear(8, 8)
    model.down.weight = model.embed.weight
    twin = copy.deepcopy(model)
    cpu_offload(model)
    model(IDS)
    opened, whole = open_model(model), ShardedModel(twin)
    assert same(values(opened), values(whole))
    moved(opened)
    moved(whole)
    assert torch.equal(model(IDS)["logits"], twin(IDS)["logits"])


def test_weights_kept_in_another_dtype_read_as_the_model_computes_with_them():
    model = tiny.llama().to(torch.bfloat16)
    twin = copy.deepcopy(model)
    cpu_offload(model, state_dict={name: value.double() for name, value in model.state_dict().items()})
    opened, whole = open_model(model), ShardedModel(twin)
    for _ in range(2):
        assert same(values(opened), values(whole))
        assert {opened.read(name).dtype for name in opened.all_names} == {torch.bfloat16}
        assert torch.equal(logits(model), logits(twin))
        moved(opened)
        moved(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_vain_is_named(kind, tmp_path):
    model = offloaded(kind, tmp_path)
    if any(parameter.is_meta for parameter in model.parameters()):
        with pytest.raises(ConfigurationError, match=r"weight: it is offloaded .* training does not reach it"):
            require_trainable(model)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.is_meta)
    require_trainable(model)


def test_an_adapter_that_has_no_values_is_named(tmp_path):
    model = get_peft_model(offloaded("some on disk", tmp_path), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj\.lora_A.*adapt layers that stay"):
        open_model(model)


def test_an_adapter_on_the_layers_in_memory_is_held_with_its_offloaded_base(tmp_path):
    model = offloaded("some on disk", tmp_path)
    names = open_model(model).all_names
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], layers_to_transform=[0]))
    opened = open_model(adapted)
    assert set(names) < set(opened.all_names)
    assert {name.split(".up_proj.")[1] for name in set(opened.all_names) - set(names)} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    whole = ShardedModel(in_memory(tmp_path))
    assert all(torch.equal(opened.read(name), whole.read(name)) for name in names)


def test_a_placeholder_without_values_is_named():
    with torch.device("meta"):
        lost = nn.Linear(4, 4)
    model = nn.Sequential(cpu_offload(nn.Linear(4, 4)), lost)
    with pytest.raises(ConfigurationError, match=r"1\.weight: it is on the meta device"):
        open_model(model)


def test_an_offloaded_quantised_weight_is_named(tmp_path):
    model = offloaded("disk", tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.empty(24, 16, dtype=torch.int8, device="meta"), requires_grad=False)
    with pytest.raises(ConfigurationError, match=r"mlp\.up_proj\.weight: it is quantised and offloaded"):
        open_model(model)


class ReadOnly(Mapping):
    def __init__(self, tensors):
        self._tensors = tensors

    def __getitem__(self, key):
        return self._tensors[key]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)


def test_a_mapping_that_cannot_be_written_to_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    cpu_offload(model, state_dict=ReadOnly(model.state_dict()))
    with pytest.raises(ConfigurationError, match=r"0\.weight: it is offloaded to a ReadOnly"):
        open_model(model)


def _dispatched(source, index):
    from accelerate import dispatch_model

    return dispatch_model(tiny.loaded(source), {"": "disk"}, offload_index=index)


def _is_offloaded(module):
    return getattr(getattr(module, "_hf_hook", None), "weights_map", None) is not None


def _hooks(model):
    return {
        name: (vars(module).get("forward"), dict(vars(module._hf_hook)), len(module._forward_hooks))
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook")
    }
