"""The polish of a run, from within its callback."""

import json

import pytest
import torch

from safedelta_hf import PolishConfig, Ridge, SafeDeltaCallback, Scale, collect_profile
from safedelta_hf.errors import ConfigurationError, DataError, SafeDeltaWarning
from safedelta_hf.polish.trainer import PolishTrainer
from tests.fixtures import tiny

RULE = Ridge(strength=2.0)
POLISH = PolishConfig(steps=0.5, rate=0.1, batch_size=4, tolerance=100.0)


def run(tmp_path, polish=POLISH, model=None, **changes):
    given = {
        "safety_dataset": tiny.rows(24, seed=1),
        "rule": RULE,
        "ordinary_dataset": tiny.rows(17, seed=9),
    } | changes
    callback = SafeDeltaCallback(**given, polish=polish)
    return callback, tiny.trainer(model or tiny.llama(), callback, tmp_path)


@pytest.fixture(scope="module")
def adjusted(tmp_path_factory):
    """What the same run ends with when it is not polished."""
    torch.manual_seed(0)
    callback, trainer = run(tmp_path_factory.mktemp("adjusted"), None)
    trainer.train()
    return callback, tiny.weights(trainer.model)


def test_training_ends_with_the_adjusted_model_polished(adjusted, tmp_path):
    callback, trainer = run(tmp_path)
    trainer.train()
    record = callback.report.polish
    assert (record.outcome, record.steps, record.learning_rate) == ("kept", 2, pytest.approx(1e-3))  # of 4 steps
    assert set(record.rows) == {"refusals", "task", "ordinary"}
    assert record.rows["refusals"] + record.examples == 24
    assert sum(record.after.values()) < sum(record.before.values())
    before, after = adjusted[1], tiny.weights(trainer.model)
    assert not tiny.same(after, before)
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 0.05
    # Nobody outside is told of a second training: its logs, its state, its arguments.
    assert trainer.args.max_steps == -1
    assert trainer.state.global_step == trainer.state.max_steps == 4
    (logged,) = (entry for entry in trainer.state.log_history if "safedelta/polish_steps" in entry)
    assert logged["safedelta/polish_divergence_task_after"] == record.after["task"]
    callback.report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["polish"]["after"] == record.after
    assert "Then polished in 2 steps" in callback.report.table()


def test_no_steps_end_with_the_adjusted_weights(adjusted, tmp_path):
    callback, trainer = run(tmp_path, PolishConfig(steps=0))
    trainer.train()
    assert callback.report.polish.before == callback.report.polish.after
    assert tiny.same(tiny.weights(trainer.model), adjusted[1])


def test_a_polish_that_fails_ends_with_the_adjusted_weights_and_says_so(adjusted, tmp_path, monkeypatch):
    def failing(self, *_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PolishTrainer, "training_step", failing)
    callback, trainer = run(tmp_path)
    with pytest.warns(SafeDeltaWarning, match="the adjusted model was not polished: RuntimeError"):
        trainer.train()
    assert tiny.same(tiny.weights(trainer.model), adjusted[1])
    assert callback.report.polish.outcome == "failed"
    assert callback.report.warning.startswith("THE MODEL WAS NOT POLISHED. Not polished: it failed (RuntimeError")
    assert callback.report.parameters == adjusted[0].report.parameters


def test_adjusting_again_begins_from_the_tuned_weights_and_polishes_with_the_same_lessons(tmp_path):
    callback, trainer = run(tmp_path, keep_tuned=tmp_path / "tuned")
    trainer.train()
    first, weights = callback.report.polish, tiny.weights(trainer.model)
    callback.adjust(trainer.model, progress=False)
    assert callback.report.polish.before == pytest.approx(first.before, rel=1e-4)
    for name, value in tiny.weights(trainer.model).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-4)


def test_each_training_is_taught_by_what_it_ended_with(tmp_path):
    callback, trainer = run(tmp_path, PolishConfig(steps=0, batch_size=4), rule=Scale(strength=0.0))
    for _ in range(2):
        trainer.train()
        assert callback.report.polish.before["task"] < 1e-6
        assert callback.report.polish.before["ordinary"] > 1e-4


def test_noise_on_embeddings_is_of_the_fine_tuning_alone(tmp_path, monkeypatch):
    seen, step = [], PolishTrainer.training_step

    def watched(self, model, inputs, *more):
        embedding = model.get_input_embeddings()
        seen.append(embedding.neftune_noise_alpha)
        return step(self, model, inputs, *more)

    monkeypatch.setattr(PolishTrainer, "training_step", watched)
    _, trainer = run(tmp_path)
    trainer.args.neftune_noise_alpha = trainer.neftune_noise_alpha = 5.0
    trainer.train()
    assert set(seen) == {0.0}


def test_a_profile_made_before_and_its_refusals_serve_as_well(tmp_path):
    rows, model = tiny.rows(24, seed=1), tiny.llama()
    profile = collect_profile(model, rows, progress=False)
    callback, trainer = run(tmp_path, model=model, profile=profile)
    trainer.train()
    held_out = set(profile.held_out.sequences)
    assert callback.report.polish.rows["refusals"] == len({tuple(row["input_ids"]) for row in rows}) - len(held_out)


def test_what_a_polish_needs_is_said_before_training(tmp_path, monkeypatch):
    profile = collect_profile(tiny.llama(), tiny.rows(24, seed=1), progress=False)
    with pytest.raises(ConfigurationError, match="which a profile does not hold; pass safety_dataset too"):
        run(tmp_path, safety_dataset=None, ordinary_dataset=None, profile=profile)
    with pytest.raises(ConfigurationError, match="polish=True must be a PolishConfig"):
        run(tmp_path, True)
    with pytest.raises(DataError, match="give at least 16 refusals"):
        run(tmp_path, safety_dataset=tiny.rows(4, seed=1))
    _, trainer = run(tmp_path)
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    with pytest.raises(ConfigurationError, match="a second Trainer, which does not work under nn.DataParallel"):
        trainer.train()
    assert trainer.state.global_step == 0
