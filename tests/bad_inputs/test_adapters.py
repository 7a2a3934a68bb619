"""An adapter folder that is not as PEFT saves one ends right or in a named error, in bounds, and stays as it was."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from safedelta_hf import Ridge, SafetyProfile, adjust_adapter_files
from safedelta_hf.deltas.lora_settings import _SETTINGS
from safedelta_hf.errors import SafeDeltaError
from tests.bad_inputs import TEXTS, VALUES, contents, crossed, damages, right_or_named
from tests.fixtures import adapters, tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MEGABYTES = 64
MODULE = "base_model.model.model.layers.0.mlp.up_proj"
DOWN, UP = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"


def base():
    return tiny.llama(num_hidden_layers=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    adapters.profile_of(base()).save(folder / "profile")
    adapters.adapted(base()).save_pretrained(folder / "adapter")
    adjust(folder / "adapter", SafetyProfile.load(folder / "profile"), folder / "warm")  # imports what is imported late
    return folder


@pytest.fixture(scope="module")
def profile(good):
    return SafetyProfile.load(good / "profile")


def adjust(adapter, profile, output):
    return adjust_adapter_files(adapter, profile=profile, output=output, rule=Ridge(strength=1.0), progress=False)


@pytest.fixture
def ends_well(good, profile, tmp_path):
    """Damage a copy of the adapter, and adjust it within bounds."""

    def check(damage, *, loads=True):
        adapter, output = tmp_path / "adapter", tmp_path / "output"
        shutil.copytree(good / "adapter", adapter)
        damage(adapter)
        before = contents(adapter)
        found = right_or_named(lambda: adjust(adapter, profile, output), megabytes=MEGABYTES)
        assert contents(adapter) == before
        if isinstance(found, SafeDeltaError):
            assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
        elif loads:
            with torch.no_grad():
                loaded = PeftModel.from_pretrained(base(), output)
                assert torch.isfinite(loaded(torch.arange(3, 9)[None]).logits).all()
        return found

    return check


def setting(name, value):
    def damage(adapter):
        settings = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps(settings | {name: value}))

    return damage


@pytest.mark.parametrize(("name", "value"), crossed(_SETTINGS))
def test_a_setting_of_any_value(name, value, ends_well):
    # Which initialisations there are depends on the version of PEFT.
    ends_well(setting(name, VALUES[value]), loads=(name, value) != ("init_lora_weights", "text"))


OTHERS = sorted(set(adapters.config().to_dict()) - set(_SETTINGS))


@pytest.mark.parametrize("name", OTHERS)
def test_a_setting_that_is_not_looked_at(name, ends_well):
    ends_well(setting(name, [["x"]]), loads=False)


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_that_is_none(text, ends_well):
    found = ends_well(lambda adapter: (adapter / CONFIG).write_bytes(TEXTS[text]))
    assert isinstance(found, SafeDeltaError)


PATTERNS = {
    "that takes for ever": {r"(.*.*.*.*.*.*)*x": 4},
    "that backtracks": {r"([a-z_.0]+)+$x": 4},
    "that is none": {"(": 4},
    "without end": {"(" * 10_000: 4},
    "that is long": {"a?" * 20_000: 4},
    "of text": "q_proj",
    "of a list": ["q_proj"],
    "to text": {"q_proj": "4"},
    "to a fraction": {"q_proj": 4.5},
    "to null": {"q_proj": None},
    "to nothing": {"q_proj": 0},
    "to infinity": {"q_proj": float("inf")},
    "to what is no number": {"q_proj": float("nan")},
    "to much": {"q_proj": 10**400},
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern(name, pattern, ends_well):
    ends_well(setting(name, PATTERNS[pattern]), loads=False)  # PEFT itself takes for ever


@pytest.mark.parametrize(
    ("name", "value"), [("r", 4.0), ("lora_alpha", "7"), ("lora_alpha", None), ("rank_pattern", "q_proj")]
)
def test_what_peft_cannot_load_is_refused_by_name(name, value, ends_well):
    found = ends_well(setting(name, value))
    assert isinstance(found, SafeDeltaError) and f"{name}={value!r}" in str(found)


def tensor(change):
    def damage(adapter):
        tensors = load_file(adapter / TENSORS)
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, adapter / TENSORS)

    return damage


def put(name, value):
    return tensor(lambda tensors: tensors.__setitem__(name, value))


def entry(value):
    return tensor(lambda tensors: tensors[DOWN].__setitem__((0, 0), value))


def renamed(new):
    return tensor(lambda tensors: tensors.__setitem__(new, tensors.pop(DOWN)))


TYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
)
SHAPES = ((), (0,), (4,), (0, 16), (4, 0), (16, 4), (4, 17), (5, 16), (4, 16, 1), (1, 4, 16), (4, 16, 1, 1), (64,))
NAMES = ("", ".", ".lora_A.weight", "lora_A", f"{MODULE}.weight", f"{MODULE}.lora_A", f"{MODULE}.lora_A.default.weight")
CHANGES = {
    **{f"{name} of {dtype}": tensor(lambda t, n=key, d=dtype: t.__setitem__(n, t[n].to(d)))
       for name, key in (("A", DOWN), ("B", UP)) for dtype in TYPES},
    **{f"{name} of shape {list(shape)}": put(key, torch.ones(shape))
       for name, key in (("A", DOWN), ("B", UP)) for shape in SHAPES},
    **{f"A called {name!r}": renamed(name) for name in (*NAMES, DOWN.upper(), f"{DOWN}\0", "é", "x" * 100_000)},
    **{f"an entry {value}": entry(value) for value in (float("nan"), float("inf"), float("-inf"), 3e38, 1e-45)},
    **{f"a stranger {name}": put(f"base_model.model.model.{name}", torch.ones(2, 3)) for name in (
        "layers.0.mlp.up_proj.lora_B.bias",
        "layers.0.mlp.up_proj.lora_embedding_A",
        "layers.0.mlp.up_proj.lora_magnitude_vector",
        "embed_tokens.token_adapter.trainable_tokens_delta",
        "embed_tokens.weight",
        "norm.weight",
        "layers.9.mlp.up_proj.lora_A.weight",
    )},
    "no A": tensor(lambda tensors: tensors.pop(DOWN)),
    "no B": tensor(lambda tensors: tensors.pop(UP)),
    "no tensors": tensor(lambda tensors: tensors.clear()),
    "B twice as high and zero": put(UP, torch.zeros(48, 4)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_tensors(change, ends_well):
    ends_well(CHANGES[change])


PROMISES = {
    "whole modules": {"modules_to_save": ["lm_head"]},
    "rows of an embedding": {"trainable_token_indices": [1, 2]},
    "rows of a module": {"trainable_token_indices": {"embed_tokens": [1, 2]}},
}


@pytest.mark.parametrize("promise", PROMISES)
def test_tensors_that_the_configuration_promises(promise, ends_well):
    ((name, value),) = PROMISES[promise].items()
    assert isinstance(ends_well(setting(name, value)), SafeDeltaError)


@pytest.mark.parametrize("number", range(len(list(damages(10_000)))))
def test_a_file_that_was_damaged(number, good, ends_well):
    _, damage = list(damages((good / "adapter" / TENSORS).stat().st_size))[number]
    ends_well(lambda adapter: (adapter / TENSORS).write_bytes(damage((adapter / TENSORS).read_bytes())))


def sparse(adapter):
    """A factor of a terabyte, all of it zeros that take no room on the disk."""
    content = (adapter / TENSORS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    end = len(content) - start
    header[DOWN] = {"dtype": "F32", "shape": [4, 1 << 36], "data_offsets": [end, end + (1 << 40)]}
    described = json.dumps({name: one for name, one in header.items() if name != DOWN} | {DOWN: header[DOWN]}).encode()
    with (adapter / TENSORS).open("wb") as stream:
        stream.write(len(described).to_bytes(8, "little") + described + content[start:])
        stream.truncate(8 + len(described) + end + (1 << 40))


def linked(name):
    def damage(adapter):
        (adapter / name).unlink()
        (adapter / name).symlink_to(adapter / name)

    return damage


def folder(name):
    def damage(adapter):
        (adapter / name).unlink()
        (adapter / name).mkdir()

    return damage


PLACES = {
    "a sparse terabyte": sparse,
    **{f"no {name}": lambda adapter, name=name: (adapter / name).unlink() for name in (CONFIG, TENSORS)},
    **{f"{name} linked to itself": linked(name) for name in (CONFIG, TENSORS)},
    **{f"{name} a folder": folder(name) for name in (CONFIG, TENSORS)},
}


@pytest.mark.parametrize("place", PLACES)
def test_files_that_are_none(place, ends_well):
    assert isinstance(ends_well(PLACES[place]), SafeDeltaError)
