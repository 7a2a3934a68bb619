"""Arguments of a wrong kind, out of range or without effect: refused by name where they are given, or right."""

import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safedelta_hf import (
    AutoStrength,
    Checkpointing,
    Dare,
    ModelStock,
    ProfileConfig,
    Ridge,
    SafeDelta,
    SafeDeltaCallback,
    SafeMerge,
    SafetyProfile,
    Scale,
    TaskRidge,
    Ties,
    Treatment,
    adjust_adapter,
    adjust_adapter_files,
    adjust_checkpoint,
    adjust_model,
    collect_profile,
    with_ordinary,
)
from safedelta_hf.errors import CaptureError, ConfigurationError, DataError, ProfileError, SafeDeltaError
from tests.bad_inputs import right_or_named
from tests.fixtures import adapters, tiny

ROWS = tiny.rows(24, seed=1)
NO_NUMBERS = ["1", "", True, None, [1.0], {"a": 1}, math.nan, 10**400, 1j, Decimal(1), torch.tensor([1.0, 2.0])]
NO_NUMBERS += [np.array([1.0, 2.0]), object(), Ridge, b"1", -1.0]


def named(value):
    """The same in every process: no address."""
    return "object" if type(value) is object else repr(value)


@pytest.fixture(scope="module")
def base():
    return tiny.llama()


@pytest.fixture(scope="module")
def profile(base):
    return collect_profile(base, ROWS, progress=False)


def refused(call, *, kind: type[SafeDeltaError] = ConfigurationError, told: str = ""):
    """Make sure that a call is refused by name."""
    error = right_or_named(call)
    assert isinstance(error, kind), error
    assert told in str(error), error


@pytest.mark.parametrize("rule", [SafeDelta, Ridge, TaskRidge, Scale, Dare])
@pytest.mark.parametrize("strength", NO_NUMBERS, ids=named)
def test_a_strength_that_is_no_number_is_refused(rule, strength):
    refused(lambda: rule(strength=strength), told="strength=")


@pytest.mark.parametrize("rule", [Ridge, TaskRidge, Scale, Dare])
def test_an_infinite_strength_is_refused(rule):
    refused(lambda: rule(strength=math.inf), told="strength=inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("lost", "confidence", "precision")
        for value in (*NO_NUMBERS, 0, math.inf)
        if (field, value is None) != ("lost", True)  # that leaves the share open
    ],
    ids=named,
)
def test_a_setting_of_a_search_that_is_no_number_is_refused(field, value):
    refused(lambda: AutoStrength(**{field: value}), told=f"{field}=")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SafeDelta(compensation="most"), "compensation="),
        (lambda: SafeDelta(compensation=None), "compensation="),
        (lambda: SafeDelta(exclude_top=1.1), "exclude_top="),
        (lambda: SafeDelta(exclude_top="0.15"), "exclude_top="),
        (lambda: SafeDelta(damping=0), "damping="),
        (lambda: SafeDelta(damping=None), "damping="),
        (lambda: SafeDelta(block=0), "block="),
        (lambda: SafeDelta(block=6), "block="),
        (lambda: SafeDelta(block=8.0), "block="),
        (lambda: TaskRidge(blend=0), "blend="),
        (lambda: TaskRidge(blend=math.inf), "blend="),
        (lambda: TaskRidge(blend="some"), "blend="),
        (lambda: Dare(seed=1.5), "seed="),
        (lambda: Dare(rescale="yes"), "rescale="),
        (lambda: Ties(others="folder"), "others="),
        (lambda: Ties(others=[3]), "others[0]"),
        (lambda: ModelStock(), ""),
        (lambda: SafeMerge(), ""),
        (lambda: Treatment(norms="drop"), "norms="),
        (lambda: Treatment(embeddings=None), "embeddings="),
        (lambda: Treatment(uncovered="adjust"), "uncovered="),
        (lambda: Treatment(head=["keep"]), "head="),
        (lambda: Checkpointing("sums", every=0), "every="),
        (lambda: Checkpointing("sums", every=True), "every="),
        (lambda: Checkpointing(3, every=1), "folder="),
    ],
)
def test_a_setting_of_a_rule_or_treatment_out_of_range_is_refused(make, told):
    refused(make, told=told)


@pytest.mark.parametrize("call", [lambda: Ridge(1.0), lambda: Scale(share=0.5), lambda: ProfileConfig(8)])
def test_an_argument_that_there_is_not_is_pythons_own_error(call):
    with pytest.raises(TypeError):
        right_or_named(call)


CONFIGS = {
    "batch_size": [0, -1, 1.5, "8", None, True, math.inf],
    "max_length": [0, -1, 2.5, "all", False],
    "moment_memory": [-1, "8 apples", "", 1.5, True, [8], "-3GB"],
    "share_moments": ["yes", 1, None],
    "holdout": [-0.1, 1, 1.0, "0.25", math.nan, True, [0.25]],
    "targets": ["", [], 3, None, {"q_proj": 1}, [3], b"q_proj", "(", ["q_proj", None]],
    "layers_to_transform": ["1", 1.5, [1.5], {"a": 1}, True],
    "layers_pattern": [3, "layers", ["("]],
    "offload_folder": [3],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in CONFIGS.items() for value in values])
def test_a_setting_of_a_profile_is_refused_when_it_is_made(field, value):
    refused(lambda: ProfileConfig(**{field: value}), told=f"{field}=")


CALLBACKS = {
    "nothing": ({}, "give either"),
    "both": ({"safety_dataset": ROWS, "profile": "folder"}, "give either"),
    "a rule's class": ({"safety_dataset": ROWS, "rule": Ridge}, "rule=Ridge is a class"),
    "no rule's name": ({"safety_dataset": ROWS, "rule": "ridges"}, "rule='ridges' is not one of"),
    "a rule that needs models": ({"safety_dataset": ROWS, "rule": "model_stock"}, "others"),
    "a number for a rule": ({"safety_dataset": ROWS, "rule": 1.0}, "rule=1.0 must be a rule"),
    "settings for a rule": ({"safety_dataset": ROWS, "rule": {"strength": 1}}, "must be a rule"),
    "a config's class": ({"safety_dataset": ROWS, "config": ProfileConfig}, "config=ProfileConfig is a class"),
    "settings for a config": ({"safety_dataset": ROWS, "config": {"batch_size": 4}}, "config="),
    "a treatment's name": ({"safety_dataset": ROWS, "treatment": "keep"}, "treatment='keep'"),
    "a number for a base": ({"safety_dataset": ROWS, "base": 3}, "base=3"),
    "a number for a folder": ({"safety_dataset": ROWS, "keep_tuned": 3}, "keep_tuned=3"),
    "the tokenizer's name": ({"safety_dataset": ROWS, "processing_class": "gpt2"}, "processing_class='gpt2'"),
    "a number for a profile": ({"profile": 3}, "profile=3"),
    "moments for a profile": ({"profile": {"w": torch.eye(2)}}, "profile="),
    "no task examples": ({"safety_dataset": ROWS, "task_examples": 0}, "task_examples=0"),
    "half a task example": ({"safety_dataset": ROWS, "task_examples": 0.5}, "task_examples=0.5"),
    "true task examples": ({"safety_dataset": ROWS, "task_examples": True}, "task_examples=True"),
    "a weight in words": ({"safety_dataset": ROWS, "ordinary_weight": "much"}, "ordinary_weight='much'"),
    "no weight": ({"safety_dataset": ROWS, "ordinary_weight": None}, "ordinary_weight=None"),
    "infinite weight": ({"safety_dataset": ROWS, "ordinary_weight": math.inf}, "ordinary_weight=inf"),
    "a task that is not weighed": ({"safety_dataset": ROWS, "task_dataset": ROWS, "rule": Ridge()}, "does not weigh"),
}


@pytest.mark.parametrize(("settings", "told"), CALLBACKS.values(), ids=CALLBACKS)
def test_the_callback_refuses_it_when_it_is_made(settings, told):
    refused(lambda: SafeDeltaCallback(**settings), told=told)


DATA = {
    "no file": ("no-such-file.jsonl", "there is no file"),
    "a folder": (Path(__file__).parent, "is a folder"),
    "no rows": ([], "it is empty"),
    "texts": (["how do I ..."] * 20, "row 0 is a str"),
    "one wrong row": ([*ROWS, None], "row 24 is a NoneType"),
    "a number": (3, "safety_dataset: a int holds no rows"),
    "one row": (ROWS[0], "safety_dataset: it is a dict with the keys"),
    "bytes": (b"rows", "row 0 is a int"),
    "foreign columns": ([{"pixels": [1]}] * 20, "pixels"),
    "eight rows": (ROWS[:8], "give at least 16 refusals (you gave 8)"),
}


@pytest.mark.parametrize(("data", "told"), DATA.values(), ids=DATA)
def test_the_callback_refuses_data_that_cannot_be_when_it_is_made(data, told):
    refused(lambda: SafeDeltaCallback(data), kind=DataError, told=told)


@pytest.mark.parametrize("name", ["ordinary_dataset", "task_dataset"])
def test_the_callback_refuses_further_data_that_cannot_be_when_it_is_made(name):
    refused(lambda: SafeDeltaCallback(ROWS, **{name: 3}), kind=DataError, told=f"{name}: a int holds no rows")


def test_eight_refusals_in_a_file_are_counted_when_the_callback_is_made(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "no"}\n\n' * 8)
    refused(lambda: SafeDeltaCallback(tmp_path / "rows.jsonl"), kind=DataError, told="(you gave 8)")
    (tmp_path / "cut.jsonl").write_text('{"text": "no"}\n{"text": ')
    refused(lambda: SafeDeltaCallback(tmp_path / "cut.jsonl"), kind=DataError, told="line 2 is not JSON")


@pytest.mark.parametrize("rule", [Ridge(strength=1.0), "safe_delta"])
def test_eight_refusals_are_enough_for_a_strength_that_is_a_number(rule):
    assert isinstance(right_or_named(lambda: SafeDeltaCallback(ROWS[:8], rule)), SafeDeltaCallback)
    config = ProfileConfig(holdout=0.25)
    assert isinstance(right_or_named(lambda: SafeDeltaCallback(ROWS[:8], config=config)), SafeDeltaCallback)


def test_a_folder_that_is_no_profile_is_refused_when_the_callback_is_made(tmp_path):
    for folder in ("folder", str(tmp_path), tmp_path, ""):
        refused(lambda folder=folder: SafeDeltaCallback(profile=folder), kind=ProfileError)


def test_names_and_folders_stand_for_rules_and_profiles(profile, tmp_path):
    profile.save(tmp_path / "profile")
    for given in (tmp_path / "profile", str(tmp_path / "profile")):
        callback = right_or_named(lambda given=given: SafeDeltaCallback(profile=given, rule="task_ridge"))
        assert callback.profile.header == profile.header and isinstance(callback._rule, TaskRidge)
    tuned = tiny.perturbed(tiny.llama())
    by_name = adjust_model(
        tuned, base=tiny.llama(), profile=str(tmp_path / "profile"), rule="safe_delta", progress=False
    )
    other = tiny.perturbed(tiny.llama())
    whole = adjust_model(other, base=tiny.llama(), profile=profile, rule=SafeDelta(), progress=False)
    assert by_name.parameters == whole.parameters and tiny.same(tiny.weights(tuned), tiny.weights(other))


COLLECTED = {
    "no model": (lambda base: {"model": "gpt2"}, ConfigurationError, "model='gpt2'"),
    "a model's class": (lambda base: {"model": torch.nn.Linear}, ConfigurationError, "model=Linear is a class"),
    "a number for data": (lambda base: {"safety_dataset": 3}, DataError, "a int holds no rows"),
    "no data": (lambda base: {"safety_dataset": []}, DataError, "it is empty"),
    "no dataset": (lambda base: {"safety_dataset": None}, DataError, "a NoneType holds no rows"),
    "one row": (lambda base: {"safety_dataset": ROWS[0]}, DataError, "it is a dict with the keys"),
    "texts": (lambda base: {"safety_dataset": ["no"] * 4}, DataError, "row 0 is a str"),
    "no file": (lambda base: {"safety_dataset": "no.jsonl"}, DataError, "there is no file"),
    "a tokenizer's name": (lambda base: {"processing_class": "gpt2"}, ConfigurationError, "processing_class="),
    "settings": (lambda base: {"config": {"holdout": 0}}, ConfigurationError, "config="),
    "a folder": (lambda base: {"checkpointing": "sums"}, ConfigurationError, "checkpointing='sums'"),
    "nothing to learn from": (
        lambda base: {"safety_dataset": [{"input_ids": [1, 2], "labels": [-100, -100]}]},
        DataError,
        "no response tokens",
    ),
    "foreign tokens": (lambda base: {"safety_dataset": [{"input_ids": [1, 10**6]}]}, DataError, "outside"),
    "too long": (lambda base: {"safety_dataset": [{"input_ids": [1] * 99}]}, DataError, "longest sequence"),
    "equal prompts": (
        lambda base: {"safety_dataset": [ROWS[0]] * 64, "config": ProfileConfig(holdout=0.25)},
        DataError,
        "about 1 different things",
    ),
    "a target that is not there": (
        lambda base: {"config": ProfileConfig(targets=["no_proj"])},
        ConfigurationError,
        "no_proj",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "told"), COLLECTED.values(), ids=COLLECTED)
def test_a_profile_is_not_collected_from_it(changes, kind, told, base):
    settings = {"model": base, "safety_dataset": ROWS, "progress": False} | changes(base)
    refused(lambda: collect_profile(**settings), kind=kind, told=told)


ADJUSTED = {
    "no model": ({"model": None}, "model=None"),
    "a path for a model": ({"model": "folder"}, "model='folder'"),
    "no base": ({"base": None}, "base=None"),
    "a number for a base": ({"base": 3}, "base=3"),
    "a rule's class": ({"rule": SafeDelta}, "rule=SafeDelta is a class"),
    "no rule's name": ({"rule": "best"}, "rule='best' is not one of"),
    "a number for a rule": ({"rule": 0.1}, "rule=0.1"),
    "no profile": ({"profile": None}, "needs a safety profile of the base; give profile="),
    "a header for a profile": ({"profile": {"base": {}}}, "profile="),
    "a treatment's name": ({"treatment": "keep"}, "treatment='keep'"),
    "a number for a folder": ({"workspace": 3}, "workspace=3"),
}


@pytest.mark.parametrize(("changes", "told"), ADJUSTED.values(), ids=ADJUSTED)
def test_a_model_is_not_adjusted_by_it(changes, told, base, profile):
    model = tiny.perturbed(tiny.llama())
    before = tiny.weights(model)
    settings = {"model": model, "base": base, "profile": profile, "rule": Ridge(strength=1.0), "progress": False}
    model_of, rest = (settings | changes).pop("model"), {k: v for k, v in (settings | changes).items() if k != "model"}
    refused(lambda: adjust_model(model_of, **rest), told=told)
    assert tiny.same(before, tiny.weights(model))


ADAPTED = {name: ADJUSTED[name] for name in ADJUSTED if name not in ("no base",)} | {
    "a number for a name": ({"adapter_name": 3}, "adapter_name=3"),
    "a number for a new name": ({"new_adapter_name": 3}, "new_adapter_name=3"),
}


@pytest.mark.parametrize(("changes", "told"), ADAPTED.values(), ids=ADAPTED)
def test_an_adapter_is_not_adjusted_by_it(changes, told, base, profile):
    model = adapters.adapted(base)
    settings = {"profile": profile, "rule": Ridge(strength=1.0), "progress": False} | changes
    refused(lambda: adjust_adapter(settings.pop("model", model), **settings), told=told)


@pytest.mark.parametrize("name", ["profile", "rule", "task_profile", "treatment", "output", "base"])
@pytest.mark.parametrize("adjust", [adjust_checkpoint, adjust_adapter_files])
def test_files_are_not_adjusted_by_numbers(name, adjust, profile, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    adapters.adapted(tiny.llama()).save_pretrained(tmp_path / "adapter")
    places = {"base": tmp_path / "model", "tuned": tmp_path / "model"}
    if adjust is adjust_adapter_files:
        places = {"adapter": tmp_path / "adapter"}
    settings = places | {"profile": profile, "output": tmp_path / "out", "rule": Ridge(strength=1.0)}
    refused(lambda: adjust(**settings | {name: 3}, progress=False), told=f"{name}=3")
    assert not (tmp_path / "out").exists()


def test_a_measured_strength_on_files_is_refused(profile, tmp_path):
    folders = {"base": tmp_path, "tuned": tmp_path, "output": tmp_path / "out"}
    for rule in (None, "ridge", Ridge(), "task_ridge"):
        refused(lambda rule=rule: adjust_checkpoint(**folders, profile=profile, rule=rule), told="strength='auto'")


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf, "much", None, True])
def test_a_weight_of_ordinary_data_that_is_none_is_refused(weight, profile):
    refused(lambda: with_ordinary(profile, profile, weight), told="weight=")


@pytest.mark.parametrize("source", ["", "no-folder", "/no/folder", "a/b/c", "./here"])
def test_what_is_no_profile_is_not_loaded(source):
    refused(lambda: SafetyProfile.load(source), kind=ProfileError)


@pytest.mark.parametrize("storage", ["", "best", "eigenbasis", "eigenbasis:0", "float32:3", None, 3])
def test_a_storage_that_there_is_not_is_refused(storage, profile, tmp_path):
    refused(lambda: profile.save(tmp_path / "profile", storage), told="storage=")
    assert not (tmp_path / "profile").exists()


def test_a_classifier_gives_no_likelihoods_to_hold_out_for():
    model = tiny.classifier()
    config = ProfileConfig(holdout=0.25)
    refused(lambda: collect_profile(model, ROWS, config=config, progress=False), kind=CaptureError, told="classifies")


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(("prefix", "maker"), [("_orig_mod.", "torch.compile"), ("base_model.model.", "PEFT")])
def test_files_whose_names_are_those_of_a_wrapped_model_are_refused_with_the_wrapper_named(
    prefix, maker, profile, tmp_path
):
    model = tiny.perturbed(tiny.llama())
    model.save_pretrained(tmp_path / "good")
    wrapped = tmp_path / "wrapped"
    model.config.save_pretrained(wrapped)
    save_file(prefixed(prefix, tiny.weights(model)), wrapped / "model.safetensors")
    told = f"Names here begin with '{prefix}', put there by {maker}"
    settings = {"profile": profile, "rule": Ridge(strength=1.0), "progress": False}
    refused(lambda: adjust_model(model, base=wrapped, **settings), kind=SafeDeltaError, told=told)
    folders = {"base": tmp_path / "good", "tuned": wrapped, "output": tmp_path / "out"}
    refused(lambda: adjust_checkpoint(**folders, **settings), kind=SafeDeltaError, told=told)


def test_a_compiled_model_is_adjusted_like_the_model_in_it(base, profile):
    tuned, other = tiny.perturbed(tiny.llama()), tiny.perturbed(tiny.llama())
    settings = {"base": base, "profile": profile, "rule": Ridge(strength=1.0), "progress": False}
    whole = adjust_model(other, **settings)
    assert adjust_model(torch.compile(tuned), **settings).parameters == whole.parameters
    assert tiny.same(tiny.weights(tuned), tiny.weights(other))


def test_a_model_inside_another_module_is_refused_with_the_wrapper_named(base, profile):
    class Around(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

    settings = {"base": base, "profile": profile, "rule": Ridge(strength=1.0), "progress": False}
    told = "Names here begin with 'module.', put there by data parallelism"
    refused(lambda: adjust_model(Around(tiny.llama()), **settings), kind=ProfileError, told=told)


def test_placeholders_of_zero_3_are_called_that(base, profile, tmp_path):
    empty = tiny.llama()
    for parameter in empty.parameters():
        parameter.data = torch.empty(0)
    settings = {"profile": profile, "rule": Ridge(strength=1.0), "progress": False}
    refused(lambda: adjust_model(empty, base=base, **settings), told="ZeRO-3")
    refused(lambda: collect_profile(empty, ROWS, progress=False), told="ZeRO-3")
    (tmp_path / "tuned").mkdir()
    save_file({name: torch.empty(0) for name in tiny.weights(base)}, tmp_path / "tuned" / "model.safetensors")
    tuned = tiny.perturbed(tiny.llama())
    refused(lambda: adjust_model(tuned, base=tmp_path / "tuned", **settings), kind=SafeDeltaError, told="ZeRO-3")
    base.save_pretrained(tmp_path / "base")
    folders = {"base": tmp_path / "base", "tuned": tmp_path / "tuned", "output": tmp_path / "out"}
    refused(lambda: adjust_checkpoint(**folders, **settings), kind=SafeDeltaError, told="ZeRO-3")
