"""What the callback reads besides the safety data: the task, and ordinary data."""

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import IterableDataset

from safedelta_hf import (
    AutoStrength,
    ProfileConfig,
    Ridge,
    SafeDelta,
    SafeDeltaCallback,
    TaskRidge,
    adjust_model,
    collect_profile,
    with_ordinary,
)
from safedelta_hf.errors import ConfigurationError, DataError, ProfileError, SafeDeltaWarning
from safedelta_hf.evaluation import sorting
from safedelta_hf.hf.profiles import examples_of, warn_of_trained_refusals
from tests.fixtures import templates, tiny

ROWS = tiny.rows(24, seed=1)
ORDINARY = tiny.rows(10, seed=8)
RULE = TaskRidge(strength=2.0)


def tuned_alone(tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(model, None, tmp_path / "alone")
    trainer.train()
    return model, trainer.train_dataset


def test_the_task_is_read_off_the_trainers_own_data(tmp_path):
    model = tiny.llama()
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path / "run").train()
    reference, data = tuned_alone(tmp_path)
    task = collect_profile(
        tiny.llama(), [data[n] for n in range(len(data))], config=ProfileConfig(holdout=0.0), progress=False
    )
    assert callback.task_profile.header.data == task.header.data
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    adjust_model(reference, base=tiny.llama(), profile=profile, task_profile=task, rule=RULE, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_given_task_data_replaces_the_trainers(tmp_path):
    callback = SafeDeltaCallback(ROWS, RULE, task_dataset=iter(ORDINARY))
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    assert callback.task_profile.header.sequences == len(ORDINARY)


def test_as_many_examples_are_drawn_as_asked_for(tmp_path):
    callback = SafeDeltaCallback(ROWS, RULE, task_examples=5)
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    assert callback.task_profile.header.sequences == 5


def test_ordinary_data_is_protected_with_its_weight(tmp_path):
    callback = SafeDeltaCallback(ROWS, Ridge(strength=2.0), ordinary_dataset=ORDINARY, ordinary_weight=0.5)
    model = tiny.llama()
    tiny.trainer(model, callback, tmp_path / "run").train()
    assert callback.profile.header.retention.weight == 0.5
    reference, _ = tuned_alone(tmp_path)
    ordinary = collect_profile(tiny.llama(), ORDINARY, config=ProfileConfig(holdout=0.0), progress=False)
    profile = with_ordinary(collect_profile(tiny.llama(), ROWS, progress=False), ordinary, 0.5)
    adjust_model(reference, base=tiny.llama(), profile=profile, rule=Ridge(strength=2.0), progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_by_default_the_task_is_weighed_and_the_strength_measured(tmp_path):
    callback = SafeDeltaCallback(ROWS)
    trainer = tiny.trainer(tiny.llama(), callback, tmp_path / "run")
    trainer.train()
    assert callback.report.rule.name == "task_ridge" and callback.report.search is not None
    logged = [entry for entry in trainer.state.log_history if "safedelta/evaluations" in entry]
    assert logged[0]["safedelta/evaluations"] == len(callback.report.search.trials)


def test_too_little_safety_data_to_measure_by_stops_before_training(tmp_path):
    model = tiny.llama()
    before = tiny.weights(model)
    with pytest.raises(DataError, match=r"give at least 16 refusals \(you gave 4\)"):
        tiny.trainer(model, SafeDeltaCallback(ROWS[:4]), tmp_path / "run").train()
    assert tiny.same(before, tiny.weights(model))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"task_dataset": ORDINARY, "rule": SafeDelta()}, "does not weigh the task"),
        ({"task_examples": 0}, "task_examples=0"),
        ({"ordinary_weight": 0.0}, "ordinary_weight"),
        ({"ordinary_weight": float("nan")}, "ordinary_weight"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_named_errors(settings, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        SafeDeltaCallback(ROWS, **settings)


def test_retention_beside_a_profile_made_before_is_a_named_error():
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    with pytest.raises(ConfigurationError, match="ordinary_dataset has no effect"):
        SafeDeltaCallback(profile=profile, ordinary_dataset=ORDINARY)


def test_task_data_that_cannot_be_read_says_where_it_comes_from(tmp_path):
    class Images(list):
        column_names = None

    trainer = tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS, RULE), tmp_path / "run")
    trainer.train_dataset = Images([{"pixels": [1, 2]}] * 4)
    trainer.args.remove_unused_columns = False
    with pytest.raises(DataError, match=r"task data: row 0 is not tokenised.*task_dataset="):
        trainer.train()


def test_a_processor_whose_template_takes_parts_reads_what_an_ordinary_tokenizer_does(tmp_path):
    plain = collect_profile(tiny.llama(), tiny.conversations(), tiny.tokenizer(), progress=False)
    callback = SafeDeltaCallback(
        tiny.conversations(),
        RULE,
        task_dataset=[{"messages": row["messages"]} for row in tiny.conversations()],
        processing_class=templates.processor(templates.PARTS),
    )
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    assert callback.profile.header.data == callback.task_profile.header.data == plain.header.data


def test_images_in_the_trainers_rows_say_what_to_pass(tmp_path):
    trainer = tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS, RULE), tmp_path / "run", remove_unused_columns=False)
    trainer.train_dataset = [{**row, "pixel_values": [[0.0]]} for row in ORDINARY]
    with pytest.raises(DataError, match="task data: row 0 holds .pixel_values., and text alone.*task_dataset="):
        trainer.train()


def test_examples_are_drawn_the_same_each_time_and_spread():
    data = [{"input_ids": [number]} for number in range(100)]
    drawn = examples_of(data, 10)
    assert drawn == examples_of(data, 10) and len(drawn) == 10 and drawn[-1]["input_ids"][0] > 50
    assert examples_of(data[:3], 10) == data[:3]
    with pytest.raises(DataError, match="no training data"):
        examples_of(None, 3)


def test_the_first_examples_of_a_stream_are_taken():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ({"input_ids": [number]} for number in range(1000))

    assert [row["input_ids"][0] for row in examples_of(Stream(), 4)] == [0, 1, 2, 3]


def test_the_first_examples_of_a_stream_with_a_length_and_of_a_shard_of_one_are_taken():
    class Sized(IterableDataset):
        def __len__(self):
            return 8

        def __iter__(self):
            yield from ({"input_ids": [number]} for number in range(8))

    for stream in (Sized(), IterableDatasetShard(Sized(), batch_size=2)):
        assert [row["input_ids"][0] for row in examples_of(stream, 4)] == [0, 1, 2, 3]


class Once(IterableDataset):
    """A stream that goes on where it was left."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class Shared(Once):
    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("kind", [Once, Shared])
def test_a_stream_that_does_not_begin_again_is_left_whole_for_the_training(tmp_path, kind):
    trainer = tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS, RULE), tmp_path / "run", max_steps=2)
    stream = trainer.train_dataset = kind(tiny.rows(40, seed=2, length=10))
    with pytest.raises(DataError, match=rf"data set \({kind.__name__}\) can be iterated over only once.*task_dataset="):
        trainer.train()
    assert len(list(stream)) == 40
    with pytest.raises(DataError, match="only once"):
        examples_of(IterableDatasetShard(stream), 3)
    callback = SafeDeltaCallback(ROWS, RULE, task_dataset=kind(ORDINARY))
    trainer = tiny.trainer(tiny.llama(), callback, tmp_path / "given", max_steps=2)
    trainer.train_dataset = kind(tiny.rows(40, seed=2, length=10))
    trainer.train()
    assert callback.task_profile.header.sequences == len(ORDINARY)


def test_a_measured_strength_reuses_a_saved_profile(tmp_path):
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    profile.save(tmp_path / "profile")
    rule = Ridge(strength=AutoStrength(confidence=0.9))
    callback = SafeDeltaCallback(profile=type(profile).load(tmp_path / "profile"), rule=rule)
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    found = callback.report.search
    assert found.examples + found.others == len(profile.held_out.sequences)


def prompted(rows):
    """The same with a prompt of two tokens."""
    return [{"input_ids": row["input_ids"], "labels": [-100, -100, *row["labels"][2:]]} for row in rows]


REFUSALS = prompted(tiny.rows(24, seed=1))
TRAINED = prompted(tiny.rows(16, seed=2, length=10))
CONTESTED = {tuple(row["input_ids"][:2]) for row in TRAINED[:3]}


def refusing(monkeypatch, contested):
    """A base that refuses some prompts."""

    def ask(model, prompts, *arguments, **settings):
        return [0.9 if prompt in contested else 0.1 for prompt in prompts]

    monkeypatch.setattr(sorting, "refusal_probabilities", ask)


def run(output, callback, data=TRAINED, model=None):
    trainer = tiny.trainer(model or tiny.llama(), callback, output)
    trainer.train_dataset = data
    trainer.train()
    return trainer


def task_of(rows, **settings):
    return collect_profile(tiny.llama(), rows, config=ProfileConfig(holdout=0.0), progress=False, **settings)


def equal(one, other):
    return set(one.moments) == set(other.moments) and all(
        torch.equal(one.moments[key].total, other.moments[key].total) for key in one.moments
    )


def test_what_the_base_would_refuse_leaves_the_task_and_report_and_log_say_so(tmp_path, monkeypatch):
    refusing(monkeypatch, CONTESTED)
    callback = SafeDeltaCallback(REFUSALS, RULE)
    trainer = run(tmp_path / "run", callback)
    assert equal(callback.task_profile, task_of(TRAINED[3:]))
    assert callback.report.sorting.left_out == 3 and callback.report.sorting == callback.task_profile.header.sorting
    assert "would refuse 3 of 16 examples; 3 left out" in callback.report.summary()
    assert "row 0 (0.900)" in callback.report.table()
    logged = next(entry for entry in trainer.state.log_history if "safedelta/task_left_out" in entry)
    assert (logged["safedelta/task_examples"], logged["safedelta/task_left_out"]) == (16, 3)


def test_a_task_that_is_not_sorted_is_what_it_was_bit_for_bit(tmp_path, monkeypatch):
    refusing(monkeypatch, CONTESTED)
    callback = SafeDeltaCallback(REFUSALS, RULE, sort_task=False)
    run(tmp_path / "run", callback)
    whole = task_of(TRAINED)
    assert callback.task_profile.header == whole.header and equal(callback.task_profile, whole)
    assert callback.report.sorting is None and "safedelta/task_examples" not in callback.report.metrics()


def test_where_nothing_is_left_the_rule_is_used_without_a_task_and_the_report_says_so(tmp_path, monkeypatch):
    refusing(monkeypatch, {tuple(row["input_ids"][:2]) for row in TRAINED})
    monkeypatch.setattr(sorting, "MOST", 0.0)  # they look harmful
    callback, model, reference = SafeDeltaCallback(REFUSALS, RULE), tiny.llama(), tiny.llama()
    with pytest.warns(SafeDeltaWarning, match="Nothing is left"):
        run(tmp_path / "run", callback, model=model)
    assert callback.task_profile is None and callback.report.rule.name == "ridge"
    assert "Nothing is left" in callback.report.warning
    run(tmp_path / "plain", None, model=reference)
    profile = collect_profile(tiny.llama(), REFUSALS, progress=False)
    adjust_model(reference, base=tiny.llama(), profile=profile, rule=Ridge(strength=2.0), progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_with_a_profile_the_refusals_that_it_holds_out_tell_how_the_base_refuses(tmp_path, monkeypatch):
    refusing(monkeypatch, CONTESTED)
    profile = collect_profile(tiny.llama(), REFUSALS, progress=False)
    callback = SafeDeltaCallback(profile=profile, rule=RULE)
    run(tmp_path / "run", callback)
    assert callback.report.sorting.left_out == 3


def test_a_profile_that_holds_nothing_out_sorts_nothing_and_the_log_says_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("safedelta_hf.hf.profiles.logger.warning", said.append)
    profile = collect_profile(tiny.llama(), REFUSALS, config=ProfileConfig(holdout=0.0), progress=False)
    callback = SafeDeltaCallback(profile=profile, rule=RULE)
    run(tmp_path / "run", callback)
    assert "holds no refusals out" in said[0] and callback.report.sorting is None


def padded(row):
    return {**row, "input_ids": [0, *row["input_ids"]], "attention_mask": [0] + [1] * len(row["input_ids"])}


@pytest.mark.parametrize("form", [dict, padded])
def test_refusals_that_are_measured_by_and_trained_on_are_counted(form):
    held_out = collect_profile(tiny.llama(), REFUSALS, progress=False).held_out
    copied = [{"input_ids": [*one.input_ids[:2], 3, 3]} for one in held_out.sequences[:2]]  # another response
    with pytest.warns(SafeDeltaWarning, match=f"2 of the {len(held_out.sequences)} refusals.*training data"):
        warn_of_trained_refusals(held_out, [*TRAINED, *map(form, copied)])


@pytest.mark.parametrize("data", [TRAINED, [{"messages": []}], "not rows"])
def test_other_training_data_is_no_matter(data, recwarn):
    held_out = collect_profile(tiny.llama(), REFUSALS, progress=False).held_out
    recwarn.clear()
    warn_of_trained_refusals(held_out, data)
    assert not recwarn


def test_the_callback_warns_of_refusals_that_are_trained_on(tmp_path):
    refusals = prompted(tiny.rows(24, seed=3, length=10))
    with pytest.warns(SafeDeltaWarning, match="refusals that the strength is measured by"):
        run(tmp_path / "run", SafeDeltaCallback(refusals, Ridge()), data=[*TRAINED, *refusals])


def test_whether_to_sort_is_a_truth_value():
    with pytest.raises(ConfigurationError, match="sort_task='no' must be True or False"):
        SafeDeltaCallback(REFUSALS, sort_task="no")


def test_a_share_that_the_held_out_refusals_cannot_show_stops_the_run_before_it_trains(tmp_path):
    callback = SafeDeltaCallback(ROWS, Ridge(strength=AutoStrength(lost=0.05)))
    trainer = tiny.trainer(tiny.llama(), callback, tmp_path)
    with pytest.raises(
        ProfileError, match=r"lost=0\.05 with confidence 0\.95 takes 59 held-out refusals.* this profile has"
    ):
        trainer.train()
    assert trainer.state.global_step == 0
