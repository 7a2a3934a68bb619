"""The base of a run is what it started from, in every run that resumes it; or there is an error."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from safedelta_hf import SafeDeltaCallback
from safedelta_hf.data.dataset import tokenizer_digest
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import BaseWeightsError, ProfileError, SafeDeltaWarning
from safedelta_hf.hf.base_weights import (
    STATE_KEY,
    RunBase,
    base_of_run,
    name_of_run,
    remember,
    require_matching,
    require_recorded,
    warn_of_other_data,
)
from safedelta_hf.weights.digest import fingerprint
from tests.fixtures import tiny
from tests.fixtures.tiny import loaded
from tests.hf.test_lifecycle import NOTHING_KEPT, ROWS, RULE, is_base


@pytest.fixture
def folder(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resumed(model, callback, output, checkpoint, **settings):
    trainer = tiny.trainer(model, callback, output, save_strategy="epoch", num_train_epochs=3, **settings)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.fixture
def interrupted(folder, tmp_path):
    """A run of three epochs from files; its first checkpoint, and the weights it ended with."""
    model = loaded(folder)
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path / "run", save_strategy="epoch", num_train_epochs=3).train()
    return tmp_path / "run" / "checkpoint-2", tiny.weights(model), callback


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(folder, interrupted, tmp_path):
    checkpoint, expected, first = interrupted
    model, callback = loaded(folder), SafeDeltaCallback(ROWS, RULE)
    trainer = resumed(model, callback, tmp_path / "again", checkpoint)
    assert trainer.state.global_step == 6
    assert tiny.same(tiny.weights(model), expected)
    assert callback.profile.header == first.profile.header and callback.report.base == str(folder)


def test_a_resumed_run_finds_the_base_although_the_model_was_built_otherwise(folder, interrupted, tmp_path):
    checkpoint, expected, _ = interrupted
    model = tiny.perturbed(tiny.llama())
    resumed(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "again", checkpoint)
    assert tiny.same(tiny.weights(model), expected)


@pytest.mark.parametrize("kind", ["folder", "model"])
def test_a_resumed_run_accepts_the_base_that_is_given(folder, interrupted, tmp_path, kind):
    checkpoint, expected, _ = interrupted
    base = folder if kind == "folder" else tiny.llama()
    model = loaded(folder)
    resumed(model, SafeDeltaCallback(ROWS, RULE, base=base), tmp_path / "again", checkpoint)
    assert tiny.same(tiny.weights(model), expected)


def test_a_resumed_run_with_another_base_stops(folder, interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    with pytest.raises(BaseWeightsError, match="not the base that the resumed run started from"):
        resumed(loaded(folder), SafeDeltaCallback(ROWS, base=tiny.perturbed(tiny.llama())), tmp_path / "2", checkpoint)


def test_a_resumed_run_whose_base_files_changed_stops(folder, interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    tiny.perturbed(tiny.llama()).save_pretrained(folder)
    with pytest.raises(BaseWeightsError, match="not the base that the resumed run started from"):
        resumed(loaded(folder), SafeDeltaCallback(ROWS), tmp_path / "again", checkpoint)


def test_a_resumed_run_whose_base_was_in_memory_only_stops_and_accepts_it(tmp_path):
    tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS), tmp_path / "run", save_strategy="epoch").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(BaseWeightsError, match="in no file when the run started"):
        resumed(tiny.llama(), SafeDeltaCallback(ROWS), tmp_path / "again", checkpoint)
    model = tiny.llama()
    resumed(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, base=tiny.llama()), tmp_path / "more", checkpoint)
    assert is_base(model)


def test_a_run_resumed_from_before_the_callback_stops_and_accepts_the_base(folder, tmp_path):
    tiny.trainer(loaded(folder), None, tmp_path / "run", save_strategy="epoch").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(BaseWeightsError, match="trained without this callback"):
        resumed(loaded(folder), SafeDeltaCallback(ROWS), tmp_path / "again", checkpoint)
    model = loaded(folder)
    trainer = resumed(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, base=folder), tmp_path / "more", checkpoint)
    assert is_base(model) and STATE_KEY in trainer.state.stateful_callbacks


def test_restored_callback_states_do_not_replace_the_callback(folder, interrupted, tmp_path):
    checkpoint, expected, _ = interrupted
    model, callback = loaded(folder), SafeDeltaCallback(ROWS, RULE)
    trainer = resumed(model, callback, tmp_path / "again", checkpoint, restore_callback_states_from_checkpoint=True)
    assert callback in trainer.callback_handler.callbacks and callback.report is not None
    assert tiny.same(tiny.weights(model), expected)


def test_a_model_loaded_from_a_checkpoint_is_not_taken_for_a_base(interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    trainer = tiny.trainer(loaded(checkpoint), SafeDeltaCallback(ROWS), tmp_path / "again")
    with pytest.raises(BaseWeightsError, match="a checkpoint of a Trainer"):
        trainer.train()
    model = loaded(checkpoint)
    tiny.trainer(model, SafeDeltaCallback(ROWS, NOTHING_KEPT, base=tiny.llama()), tmp_path / "more").train()
    assert is_base(model)


def test_a_reused_base_is_compared_with_the_checkpoint_that_is_resumed(folder, interrupted, tmp_path):
    checkpoint, _, _ = interrupted
    model, callback = tiny.perturbed(tiny.llama()), SafeDeltaCallback(ROWS)
    trainer = tiny.trainer(model, callback, tmp_path / "again", save_strategy="epoch", num_train_epochs=3)
    trainer.train()
    with pytest.raises(BaseWeightsError, match="not the base that the resumed run started from"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_base_that_was_given_as_a_folder_is_found_again_on_resume(folder, tmp_path):
    start = tiny.perturbed(tiny.llama())
    callback = SafeDeltaCallback(ROWS, RULE, base=folder)
    tiny.trainer(start, callback, tmp_path / "run", save_strategy="epoch", num_train_epochs=3).train()
    model = tiny.llama()
    resumed(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "again", tmp_path / "run" / "checkpoint-2")
    assert tiny.same(tiny.weights(model), tiny.weights(start))


@pytest.mark.parametrize("wrong", ["the model", "another size"])
def test_a_base_that_cannot_be_one_stops_before_training(tmp_path, wrong):
    model = tiny.llama()
    base, message = {
        "the model": (model, "shares its weights"),
        "another size": (tiny.llama(vocab_size=64), r"is \[64, 16\] in a model in memory and \[48, 16\] in the model"),
    }[wrong]
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, base=base), tmp_path)
    with pytest.raises(BaseWeightsError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def state(**changes):
    return TrainerState(**{"global_step": 5} | changes)


def run_base(digests=None, weights=None):
    return RunBase(weights=weights or SimpleNamespace(source="there"), digests=digests or {"w": "1"}, moved=())


def test_the_digest_of_a_base_is_that_of_its_weights_in_whatever_order():
    one = run_base({"a": "1", "b": "2"})
    assert one.digest == run_base({"b": "2", "a": "1"}).digest
    others = [run_base({"a": "1"}), run_base({"a": "2", "b": "1"}), run_base({"a": "1", "c": "2"})]
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_a_run_has_one_name_for_good_and_another_run_another():
    one, other = state(), state()
    assert name_of_run(one) is None
    remember(run_base(), one, "data")
    remember(run_base(), other, "data")
    name = name_of_run(one)
    assert name is not None and name != name_of_run(other)
    remember(run_base({"w": "2"}), one, "data")
    assert name_of_run(one) == name and one.stateful_callbacks[STATE_KEY]["digest"] == run_base({"w": "2"}).digest


def test_a_record_survives_the_trainers_file(tmp_path):
    one = state()
    remember(run_base(), one, "data")
    one.save_to_json(str(tmp_path / "state.json"))
    again = TrainerState.load_from_json(str(tmp_path / "state.json"))
    assert name_of_run(again) == name_of_run(one)
    require_recorded(run_base(), again)
    with pytest.raises(BaseWeightsError, match="there is not the base that the resumed run started from"):
        require_recorded(run_base({"w": "2"}), again)


def test_a_state_without_a_record_asks_for_nothing():
    require_recorded(run_base(), state())


def test_files_are_recorded_where_the_base_is_in_files(folder):
    model = open_model(loaded(folder))
    run = base_of_run(model, state(global_step=0), None, folder.parent / "output")
    remember(run, started := state(), "data")
    assert started.stateful_callbacks[STATE_KEY]["source"] == str(folder) and run.moved == ()
    resumed_run = base_of_run(model, started, None, folder.parent / "output")
    assert resumed_run.digests == run.digests and resumed_run.weights.source == str(folder)


def test_weights_that_moved_since_are_named(folder):
    model = loaded(folder)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    run = base_of_run(open_model(model), state(global_step=0), folder, folder.parent / "output")
    assert run.moved == ("model.norm.weight",)
    assert run.digests == fingerprint(open_model(loaded(folder)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "trained without this callback"),
        ({"run": "1", "digest": "", "source": None, "revision": None}, "in no file when the run started"),
    ],
)
def test_a_base_that_no_record_leads_to_is_never_guessed(record, message, tmp_path):
    resumed_at = state(stateful_callbacks={} if record is None else {STATE_KEY: record})
    with pytest.raises(BaseWeightsError, match=f"^resumed at step 5.*{message}.*pass base="):
        base_of_run(open_model(tiny.Plain()), resumed_at, None, tmp_path)


@pytest.mark.parametrize(("begun_with", "warns"), [("data", False), ("other", True), (None, False)])
def test_a_resumed_run_with_other_safety_data_says_so(begun_with, warns):
    resumed = state()
    if begun_with is not None:
        remember(run_base(), resumed, begun_with)
    profile = SimpleNamespace(header=SimpleNamespace(data="data"))
    told = pytest.warns(SafeDeltaWarning, match="began with other safety data") if warns else nullcontext()
    with warnings.catch_warnings(), told:
        if not warns:
            warnings.simplefilter("error")
        warn_of_other_data(profile, resumed)


def profile_of(base, tokenizer):
    return SimpleNamespace(header=SimpleNamespace(base=base, tokenizer=tokenizer, model="Plain"))


def test_a_profile_has_to_be_of_this_base_and_tokenizer():
    tokenizer = tiny.tokenizer()
    made = tokenizer_digest(tokenizer)
    for fine in (made, None):
        require_matching(profile_of({"w": "1"}, fine), run_base(), tokenizer)
    require_matching(profile_of({"w": "1"}, "another"), run_base(), None)
    with pytest.raises(ProfileError, match="another tokenizer or chat template"):
        require_matching(profile_of({"w": "1"}, "another"), run_base(), tokenizer)
    with pytest.raises(ProfileError, match="Plain with 2 parameters; the one that is fine-tuned has 1.*differ in v"):
        require_matching(profile_of({"w": "1", "v": "2"}, None), run_base(), None)
    with pytest.raises(ProfileError, match="1 of 2 weights differ, such as v"):
        require_matching(profile_of({"w": "1", "v": "2"}, None), run_base({"w": "1", "v": "3"}), None)
