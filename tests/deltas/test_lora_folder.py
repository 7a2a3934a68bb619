"""An adapter in files: what its names mean, what its settings say, and what is written of it."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from safedelta_hf.deltas.lora_deltas import BiasDelta, FullDelta, LowRankDelta, TokenRowsDelta
from safedelta_hf.deltas.lora_folder import TENSOR_FILE, AdapterFolder, LoraTensors
from safedelta_hf.deltas.lora_settings import CONFIG_FILE, require_weight_delta
from safedelta_hf.errors import AdapterError
from safedelta_hf.report.provenance import RECORD_FILE
from safedelta_hf.weights.digest import digest
from tests.fixtures import by_hand

PREFIX = "base_model.model."
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up", "down"]}


def pair(module, rank=2, inside=5, outside=4):
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, inside),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(outside, rank),
    }


def saved(folder, tensors, **changes):
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(SETTINGS | changes))
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("changes", "module", "rank", "expected"),
    [
        ({}, "layers.0.up", 2, 3 / 2),
        ({"use_rslora": True}, "layers.0.up", 2, 3 / math.sqrt(2)),
        ({"rank_pattern": {"up": 4}, "alpha_pattern": {"up": 10}}, "layers.0.up", 4, 10 / 4),
        ({"rank_pattern": {"up": 4}, "alpha_pattern": {"up": 10}}, "layers.0.down", 2, 3 / 2),
        ({"rank_pattern": {"layers.1.up": 4}}, "layers.1.up", 4, 3 / 4),
    ],
)
def test_the_scaling_of_a_module_is_its_own_alpha_by_its_own_rank(changes, module, rank, expected, tmp_path):
    folder = AdapterFolder(saved(tmp_path / "in", pair(module), **changes))
    assert folder.scaling(module, rank) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(AdapterError, match=rf"{module}: the factors have rank 7, {CONFIG_FILE} says {rank}"):
        folder.scaling(module, 7)


def product(folder, module):
    """Oracle: the delta of a module, float64."""
    down, up = (folder.tensors[f"{PREFIX}{module}.lora_{one}.weight"].double() for one in "AB")
    return folder.scaling(module, len(down)) * up @ down


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 4}, "alpha_pattern": {"up": 9}}])
def test_subtracting_what_it_started_from_leaves_the_delta_to_the_original_base(changes, tmp_path):
    rank = 4 if "rank_pattern" in changes else 2
    settings = changes | {"init_lora_weights": "pissa"}
    one, other = (
        AdapterFolder(saved(tmp_path / name, pair("up", rank) | pair("down"), **settings)) for name in ("in", "start")
    )
    expected = {module: product(one, module) - product(other, module) for module in ("up", "down")}
    one.subtract(other)
    for module, delta in expected.items():
        torch.testing.assert_close(product(one, module), delta, rtol=1e-6, atol=1e-6)
    assert one.is_converted and one.settings["r"] == 4 and one.settings["init_lora_weights"] is True
    one.write(tmp_path / "out", {}, by_hand.report())
    read = AdapterFolder(tmp_path / "out")
    for module, delta in expected.items():
        torch.testing.assert_close(product(read, module), delta, rtol=1e-6, atol=1e-6)


def test_what_does_not_belong_together_is_not_subtracted(tmp_path):
    plain = AdapterFolder(saved(tmp_path / "plain", pair("up")))
    with pytest.raises(AdapterError, match="not initialised from the base weights"):
        plain.subtract(plain)
    pissa = AdapterFolder(saved(tmp_path / "pissa", pair("up"), init_lora_weights="pissa"))
    with pytest.raises(AdapterError, match="holds other tensors"):
        pissa.subtract(AdapterFolder(saved(tmp_path / "wide", pair("up", inside=6), init_lora_weights="pissa")))


def test_what_is_written_has_the_types_of_the_old_tensors_and_all_that_was_not_replaced(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in (pair("up") | pair("down")).items()}
    source = saved(tmp_path / "in", tensors)
    (source / "README.md").write_text("mine")
    (source / "checkpoint-1").mkdir()
    folder, name = AdapterFolder(source), f"{PREFIX}up.lora_A.weight"
    folder.write(tmp_path / "out", {name: torch.ones(2, 5)}, by_hand.report())
    found = load_file(tmp_path / "out" / TENSOR_FILE)
    assert found.keys() == tensors.keys() and {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found[name], torch.ones(2, 5).bfloat16())
    assert all(torch.equal(found[other], tensors[other]) for other in tensors if other != name)
    assert (tmp_path / "out" / CONFIG_FILE).read_bytes() == (source / CONFIG_FILE).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        CONFIG_FILE,
        TENSOR_FILE,
        RECORD_FILE,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA does not add a product B A"),
        ({"use_dora": True}, "with use_dora the delta is not linear"),
        ({"alora_invocation_tokens": [1]}, "acts on some tokens only"),
        ({"target_parameters": ["experts.up"]}, "target_parameters is not covered from files"),
        ({"peft_type": "NOTHING"}, "cannot be read by PEFT"),
    ],
)
def test_settings_that_give_no_delta_are_refused(changes, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        AdapterFolder(saved(tmp_path / "in", pair("up"), **changes))


@dataclass
class Settings:
    """What is looked at of a configuration of PEFT."""

    init_lora_weights: object = True


def test_a_base_that_was_replaced_by_an_approximation_is_refused():
    with pytest.raises(AdapterError, match="LoftQ replaced the base"):
        require_weight_delta(Settings(init_lora_weights="loftq"))


UNSET = {"trainable_token_indices": None, "modules_to_save": None, "target_modules": "all-linear"}


def sorted_out(tensors, base=None, transposed=(), **config):
    """The deltas that tensors of an adapter are sorted into."""
    base = base or {}
    header = by_hand.header_of(
        base={name: digest(value) for name, value in base.items()}, dtypes=dict.fromkeys(base, "float32")
    )
    adapter = SimpleNamespace(
        tensors={PREFIX + name: tensor for name, tensor in tensors.items()},
        shapes={PREFIX + name: tuple(tensor.shape) for name, tensor in tensors.items()},
        config=SimpleNamespace(
            **{"trainable_token_indices": None, "modules_to_save": None, "target_modules": "all-linear"} | config
        ),
        scaling=lambda module, rank: 3 / rank,
    )
    return {delta.parameter: delta for delta in LoraTensors(adapter, header, set(transposed), base.__getitem__)}


def own(module, **changes):
    return {name.removeprefix(PREFIX): tensor for name, tensor in pair(module, **changes).items()}


def test_tensors_are_sorted_by_the_parameter_that_they_tune():
    base = {"norm.weight": torch.ones(4), "up.bias": torch.zeros(4), "tokens.weight": torch.zeros(6, 3)}
    tensors = {
        **own("up"),
        "up.lora_B.bias": torch.randn(4),
        "embed.lora_embedding_A": torch.randn(2, 9),
        "embed.lora_embedding_B": torch.randn(5, 2),
        "tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 3),
        "norm.weight": torch.randn(4),
        **own("down"),
    }
    found = sorted_out(tensors, base, transposed=["down.weight"], trainable_token_indices=[4, 1])
    assert {name: (type(delta), delta.shape) for name, delta in found.items()} == {
        "up.weight": (LowRankDelta, (4, 5)),
        "up.bias": (BiasDelta, (4,)),
        "embed.weight": (LowRankDelta, (9, 5)),
        "tokens.weight": (TokenRowsDelta, (6, 3)),
        "norm.weight": (FullDelta, (4,)),
        "down.weight": (LowRankDelta, (5, 4)),
    }
    assert {name for delta in found.values() for name in delta.tensors} == {PREFIX + name for name in tensors}
    assert {found[name].scaling for name in ("up.weight", "up.bias", "embed.weight")} == {1.5}
    assert [found[name].transposed for name in ("up.weight", "embed.weight", "down.weight")] == [False, True, True]
    assert found["tokens.weight"].indices.tolist() == [4, 1]
    embedding = 1.5 * (tensors["embed.lora_embedding_B"].double() @ tensors["embed.lora_embedding_A"].double()).T
    torch.testing.assert_close(found["embed.weight"].delta().values.double(), embedding, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_base_is_no_delta_whatever_it_is_called():
    head = torch.randn(3, 2)
    tensors = {"head.base_layer.weight": head.clone()}
    assert sorted_out(tensors, {"head.weight": head}) == {}
    assert set(sorted_out({"head.base_layer.weight": head + 1}, {"head.weight": head})) == {"head.weight"}


def test_indices_of_tokens_are_those_of_the_module():
    rows = {"a.embed.token_adapter.trainable_tokens_delta": torch.randn(2, 3)}
    base = {"a.embed.weight": torch.zeros(6, 3)}
    found = sorted_out(rows, base, trainable_token_indices={"other": [0], "embed": [5, 2]})
    assert found["a.embed.weight"].indices.tolist() == [5, 2]
    for indices, message in (([1, 2, 3], "2 rows for 3"), ({"other": [0]}, r"names \['other'\] only")):
        with pytest.raises(AdapterError, match=f"a.embed: .*{message}"):
            sorted_out(rows, base, trainable_token_indices=indices)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"up.lora_A.weight": torch.zeros(2, 5)}, r"^up\.lora_B\.weight: not in the adapter"),
        ({"up.lora_B.weight": torch.zeros(4, 2)}, r"^up\.lora_A\.weight: not in the adapter"),
        (own("up") | {"up.lora_A.weight": torch.zeros(3, 5)}, r"^up: A is \[3, 5\] and B is \[4, 2\]"),
        (own("up") | {"up.lora_B.bias": torch.zeros(4)}, "^up: .*adds a bias to a layer that has none"),
        ({"stranger": torch.zeros(3)}, "^stranger: a tensor of the adapter that is neither"),
        ({"head.weight": torch.zeros(4, 2)}, r"^head\.weight: \[4, 2\] in the adapter, \[3, 2\] in the base"),
    ],
)
def test_a_tensor_that_means_nothing_is_named(tensors, message):
    with pytest.raises(AdapterError, match=message):
        sorted_out(tensors, {"head.weight": torch.ones(3, 2)})
