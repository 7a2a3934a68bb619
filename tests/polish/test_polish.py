"""Polishing what was adjusted: no step moves nothing, the right teachers are followed, and failures leave no trace."""

import copy
from dataclasses import replace

import pytest
import torch

from safedelta_hf import PolishConfig, polish_model
from safedelta_hf.errors import AdjustmentError, ConfigurationError, DataError
from safedelta_hf.polish import polish as module
from safedelta_hf.polish.trainer import PolishTrainer, arguments_for_polish
from tests.fixtures import tiny

DATA = {
    "refusals": tiny.rows(24, seed=1),
    "task": tiny.rows(16, seed=2),
    "ordinary": tiny.rows(16, seed=3),
}
FREE = 100.0
"""A tolerance that forbids nothing."""


def polished(model, tmp_path, *, base, tuned=None, ordinary=True, **changes):
    settings = {"steps": 20, "batch_size": 4, "tolerance": FREE} | changes
    arguments = tiny.arguments(tmp_path, learning_rate=settings.pop("learning_rate", 1e-2))
    return polish_model(
        model,
        DATA["refusals"],
        args=arguments,
        base=base,
        tuned=tuned,
        task_dataset=None if tuned is None else DATA["task"],
        ordinary_dataset=DATA["ordinary"] if ordinary else None,
        config=PolishConfig(**settings),
        progress=False,
    )


@pytest.fixture
def models():
    """A base, a fine-tune of it, and what an adjustment might have left between the two."""
    base = tiny.llama()
    return base, tiny.perturbed(tiny.llama(), 0.1, seed=5), tiny.perturbed(tiny.llama(), 0.1, seed=6)


def test_the_model_comes_nearer_to_the_teacher_of_each_kind_of_rows(models, tmp_path):
    base, tuned, adjusted = models
    record = polished(adjusted, tmp_path, base=base, tuned=tuned)
    assert record.outcome == "kept"
    assert set(record.rows) == set(record.before) == set(DATA)
    assert all(record.after[kind] < record.before[kind] for kind in DATA), record


@pytest.mark.parametrize("kind", DATA)
def test_each_kind_is_taught_by_its_own_teacher(kind, models, tmp_path):
    base, tuned, _ = models
    record = polished(copy.deepcopy(tuned if kind == "task" else base), tmp_path, base=base, tuned=tuned, steps=0)
    assert record.before[kind] < 1e-6
    assert all(record.before[other] > 1e-3 for other in DATA if (other == "task") != (kind == "task"))


def test_no_step_leaves_every_bit_and_everything_else(models, tmp_path):
    base, tuned, adjusted = models
    adjusted.train()
    adjusted.model.layers[0].eval()
    before = tiny.weights(adjusted)
    modes, random = {m: m.training for m in adjusted.modules()}, torch.random.get_rng_state()
    for steps in (0, 2):
        polished(adjusted, tmp_path, base=base, tuned=tuned, steps=steps)
        assert tiny.same(tiny.weights(adjusted), before) == (steps == 0)
        assert {m: m.training for m in adjusted.modules()} == modes
        assert torch.equal(torch.random.get_rng_state(), random)
        assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(adjusted).keys()
        assert all(parameter.grad is None for parameter in adjusted.parameters())


def test_a_model_that_is_its_teacher_stays(models, tmp_path):
    base, _, _ = models
    model = copy.deepcopy(base)
    record = polished(model, tmp_path, base=base)
    assert max(record.before.values()) < 1e-6
    assert tiny.same(tiny.weights(model), tiny.weights(base)), record


def test_refusals_that_suffer_undo_it_bit_for_bit(models, tmp_path):
    base, tuned, _ = models
    model = copy.deepcopy(base)
    before = tiny.weights(model)
    record = polished(model, tmp_path, base=base, tuned=tuned, tolerance=1e-6, learning_rate=1.0)
    assert record.outcome == "undone"
    assert max(record.rise_after) > record.tolerance
    assert "less likely" in record.warning
    assert tiny.same(tiny.weights(model), before)


def test_a_failure_in_the_middle_leaves_the_adjusted_weights(models, tmp_path, monkeypatch):
    base, tuned, adjusted = models
    before, step = tiny.weights(adjusted), PolishTrainer.training_step

    def failing(self, *arguments, **more):
        if self.state.global_step == 2:
            assert not tiny.same(tiny.weights(adjusted), before)
            raise RuntimeError("out of memory")
        return step(self, *arguments, **more)

    monkeypatch.setattr(PolishTrainer, "training_step", failing)
    with pytest.raises(AdjustmentError, match="RuntimeError while polishing the weights .out of memory."):
        polished(adjusted, tmp_path, base=base, tuned=tuned)
    assert tiny.same(tiny.weights(adjusted), before)


def adapted(seed=3):
    from peft import LoraConfig, get_peft_model

    model = tiny.llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))


def test_of_an_adapter_nothing_else_is_trained_and_the_base_below_it_teaches(tmp_path):
    model, tuned = adapted(), adapted(seed=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = polished(model, tmp_path, base=None, tuned=tuned)
    assert record.outcome == "kept"
    assert all(record.after[kind] < record.before[kind] for kind in DATA), record
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    apart = polished(model, tmp_path, base=tiny.llama(), tuned=tuned, steps=0)
    assert apart.before == pytest.approx(record.after)


def test_teachers_can_be_folders(models, tmp_path):
    base, tuned, adjusted = models
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    expected = polished(copy.deepcopy(adjusted), tmp_path, base=base, tuned=tuned, steps=1)
    found = polished(adjusted, tmp_path, base=str(tmp_path / "base"), tuned=tmp_path / "tuned", steps=1)
    assert found == replace(expected, after=found.after, rise_after=found.rise_after)
    assert found.after == pytest.approx(expected.after)


def test_what_is_missing_is_named_before_anything_is_read(models, tmp_path):
    base, tuned, adjusted = models
    arguments = tiny.arguments(tmp_path)

    def refused(kind, message, **changes):
        given = {"args": arguments, "base": base, "config": PolishConfig(steps=1)} | changes
        with pytest.raises(kind, match=message):
            polish_model(adjusted, given.pop("rows", DATA["refusals"]), **given)

    refused(ConfigurationError, "pass base=", base=None)
    refused(ConfigurationError, "pass both, or neither", tuned=tuned)
    refused(ConfigurationError, "pass both, or neither", task_dataset=DATA["task"])
    refused(ConfigurationError, "how many those were is not known", config=None)
    refused(ConfigurationError, "args=.* must be the TrainingArguments", args=None)
    refused(DataError, "none can be held out", rows=DATA["refusals"][:1])
    refused(ConfigurationError, "base='nowhere' cannot be loaded|base 'nowhere' cannot be loaded", base="nowhere")


def test_a_step_has_the_wanted_rows_of_each_kind_and_no_more_in_memory_than_the_run(tmp_path):
    for batch, kinds, wanted in ((8, 3, 16), (32, 3, 16), (1, 3, 5), (64, 2, 16), (10, 3, 16)):
        args = tiny.arguments(tmp_path, per_device_train_batch_size=batch)
        own = arguments_for_polish(args, PolishConfig(batch_size=wanted), 7, kinds, progress=False)
        items = own.per_device_train_batch_size * own.gradient_accumulation_steps
        assert wanted <= items < wanted + own.gradient_accumulation_steps
        assert own.per_device_train_batch_size * kinds <= max(batch, kinds)
        assert (args.max_steps, own.max_steps) == (-1, 7)
        assert own.report_to == []


@pytest.mark.parametrize(
    ("before", "after", "rises", "why"),
    [
        ((1.0, 0.1), (0.5, 0.2), (0.0, 0.01), ""),
        ((1.0, 0.1), (0.5, 0.2), (0.0, 0.03), "less likely"),
        ((1.0, 0.1), (0.5, 0.2), (float("nan"), 0.0), "less likely"),
        ((0.1, 0.1), (0.0, 0.3), (0.0, 0.01), "led away"),
        ((0.1, 0.1), (float("nan"), 0.0), (0.0, 0.01), "led away"),
    ],
)
def test_what_is_kept_is_a_gain_within_the_tolerance_or_no_worse_than_before(before, after, rises, why):
    of_kinds = [dict(zip(("refusals", "task"), values, strict=True)) for values in (before, after)]
    reason = module._why_undone(*of_kinds, (0.0, 0.02), rises, 0.01)
    assert why in reason
    assert bool(reason) == bool(why)
