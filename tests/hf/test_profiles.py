"""What the callback reads besides the safety data: the task, and ordinary data."""

import pytest
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
    with_retention,
)
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.hf.profiles import examples_of
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
    assert callback.task.header.data == task.header.data
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    adjust_model(reference, base=tiny.llama(), profile=profile, task=task, rule=RULE, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_given_task_data_replaces_the_trainers(tmp_path):
    callback = SafeDeltaCallback(ROWS, RULE, task_dataset=iter(ORDINARY))
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    assert callback.task.header.sequences == len(ORDINARY)


def test_as_many_examples_are_drawn_as_asked_for(tmp_path):
    callback = SafeDeltaCallback(ROWS, RULE, task_examples=5)
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    assert callback.task.header.sequences == 5


def test_ordinary_data_is_protected_with_its_weight(tmp_path):
    callback = SafeDeltaCallback(ROWS, Ridge(strength=2.0), retention_dataset=ORDINARY, retention_weight=0.5)
    model = tiny.llama()
    tiny.trainer(model, callback, tmp_path / "run").train()
    assert callback.profile.header.retention.weight == 0.5
    reference, _ = tuned_alone(tmp_path)
    ordinary = collect_profile(tiny.llama(), ORDINARY, config=ProfileConfig(holdout=0.0), progress=False)
    profile = with_retention(collect_profile(tiny.llama(), ROWS, progress=False), ordinary, 0.5)
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
        ({"retention_weight": 0.0}, "retention_weight"),
        ({"retention_weight": float("nan")}, "retention_weight"),
    ],
)
def test_settings_without_effect_or_out_of_range_are_named_errors(settings, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        SafeDeltaCallback(ROWS, **settings)


def test_retention_beside_a_profile_made_before_is_a_named_error():
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    with pytest.raises(ConfigurationError, match="retention_dataset has no effect"):
        SafeDeltaCallback(profile=profile, retention_dataset=ORDINARY)


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
    assert callback.profile.header.data == callback.task.header.data == plain.header.data


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
    assert callback.task.header.sequences == len(ORDINARY)


def test_a_measured_strength_reuses_a_saved_profile(tmp_path):
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    profile.save(tmp_path / "profile")
    rule = Ridge(strength=AutoStrength(tolerance=0.5))
    callback = SafeDeltaCallback(profile=type(profile).load(tmp_path / "profile"), rule=rule)
    tiny.trainer(tiny.llama(), callback, tmp_path / "run").train()
    assert callback.report.search.examples == len(profile.held_out.sequences)
