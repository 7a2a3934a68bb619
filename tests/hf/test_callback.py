"""The callback in an ordinary Trainer run."""

import math

import pytest
import torch
from transformers import TrainerCallback

from safedelta_hf import ProfileConfig, SafeDelta, SafeDeltaCallback, Treatment, adjust_model, collect_profile
from safedelta_hf.errors import (
    AdjustmentError,
    BaseWeightsError,
    ConfigurationError,
    CoverageError,
    DataError,
    NumericalError,
    ProfileError,
)
from tests.fixtures import architectures, tiny
from tests.fixtures.tiny import loaded

ROWS = tiny.rows(24, seed=1)
RULE = SafeDelta(strength=3.0)


def trained(model, output, **settings):
    """What the same run gives without the callback."""
    tiny.trainer(model, None, output, **settings).train()
    return tiny.weights(model)


def test_the_model_ends_as_adjust_model_would_leave_it(tmp_path):
    model, reference = tiny.llama(), tiny.llama()
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path / "one").train()
    trained(reference, tmp_path / "two")
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    adjust_model(reference, base=tiny.llama(), profile=profile, rule=RULE, progress=False)
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_the_training_itself_is_not_disturbed(tmp_path):
    model, reference = tiny.llama(attention_dropout=0.2), tiny.llama(attention_dropout=0.2)
    tiny.trainer(model, SafeDeltaCallback(ROWS, SafeDelta(strength=math.inf, exclude_top=0.0)), tmp_path / "1").train()
    assert tiny.same(tiny.weights(model), trained(reference, tmp_path / "2"))


def test_callbacks_argument_and_add_callback_are_alike(tmp_path):
    one, other = tiny.llama(), tiny.llama()
    tiny.trainer(one, SafeDeltaCallback(ROWS, RULE), tmp_path / "one").train()
    trainer = tiny.trainer(other, None, tmp_path / "two")
    trainer.add_callback(SafeDeltaCallback(ROWS, RULE))
    trainer.train()
    assert tiny.same(tiny.weights(one), tiny.weights(other))


def test_save_model_and_evaluate_see_the_adjusted_weights(tmp_path):
    model = tiny.llama()
    reset = SafeDeltaCallback(ROWS, SafeDelta(strength=0.0), treatment=Treatment(embeddings="reset"))
    trainer = tiny.trainer(model, reset, tmp_path / "run")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert tiny.same(tiny.weights(model), tiny.weights(tiny.llama()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, abs=1e-6)
    trainer.save_model(str(tmp_path / "saved"))
    assert tiny.same(tiny.weights(loaded(tmp_path / "saved")), tiny.weights(model))


def test_checkpoints_are_not_adjusted(tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "run", save_strategy="epoch")
    trainer.train()
    last = loaded(tmp_path / "run" / f"checkpoint-{trainer.state.global_step}")
    assert tiny.same(tiny.weights(last), trained(tiny.llama(), tmp_path / "plain"))
    assert not tiny.same(tiny.weights(last), tiny.weights(model))


def test_the_best_model_is_what_is_adjusted(tmp_path):
    model = tiny.llama()
    trainer = tiny.trainer(
        model,
        SafeDeltaCallback(ROWS, SafeDelta(strength=math.inf, exclude_top=0.0)),
        tmp_path / "run",
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None and not best.endswith(f"-{trainer.state.global_step}")
    assert tiny.same(tiny.weights(model), tiny.weights(loaded(best)))


class Listener(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


@pytest.mark.parametrize("listener_first", [True, False])
def test_metrics_reach_the_log_history_and_every_tracker(tmp_path, listener_first):
    listener, callback = Listener(), SafeDeltaCallback(ROWS, RULE)
    trainer = tiny.trainer(tiny.llama(), None, tmp_path)
    for added in (listener, callback) if listener_first else (callback, listener):
        trainer.add_callback(added)
    trainer.train()
    expected = callback.report.metrics()
    for logs in (trainer.state.log_history[-1], listener.logs[-1]):
        assert {key: logs[key] for key in expected} == expected
        assert logs["epoch"] == 2 and "safedelta/seconds" not in logs  # equal runs have equal logs
    assert trainer.state.log_history[-1]["step"] == trainer.state.global_step


def test_tensorboard_shows_the_metrics_although_its_writer_was_closed(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(tiny.llama(), callback, tmp_path / "run", report_to="tensorboard").train()
    found = {}
    for path in (tmp_path / "logs").rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        found |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert found["train/safedelta/kept_share"] == pytest.approx(callback.report.metrics()["safedelta/kept_share"])


def test_a_frozen_model_stays_bit_identical_and_the_report_says_so(tmp_path, monkeypatch):
    model, warnings = tiny.llama(), []
    monkeypatch.setattr("safedelta_hf.hf.callback.logger.warning", lambda text, *args: warnings.append(text % args))
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path, learning_rate=0.0).train()
    assert "no weight was changed" in warnings[0]
    assert tiny.same(tiny.weights(model), tiny.weights(tiny.llama()))
    assert callback.report.outcomes == {"unchanged": len(list(model.parameters()))}
    assert "changed nothing" in str(callback.report)


def test_frozen_parameters_are_reported_as_unchanged(tmp_path):
    model = tiny.llama()
    model.model.embed_tokens.requires_grad_(False)
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path).train()
    outcomes = {record.parameter: record.outcome for record in callback.report.parameters}
    assert outcomes.pop("model.embed_tokens.weight") == "unchanged" and set(outcomes.values()) == {"adjusted"}


def test_base_weights_are_read_again_from_the_files_not_copied(folder, tmp_path):
    callback = SafeDeltaCallback(ROWS, RULE)
    model = loaded(folder)
    tiny.trainer(model, callback, tmp_path / "run").train()
    assert callback.report.base == str(folder)
    other = tiny.llama(tied=True)
    copied = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(other, copied, tmp_path / "other").train()
    assert copied.report.base.endswith("weights copied to host memory at train start")
    assert tiny.same(tiny.weights(model), tiny.weights(other))


def test_training_into_the_folder_of_the_base_copies_the_base_first(folder):
    model, reference = loaded(folder), tiny.llama(tied=True)
    tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), folder).train()
    tiny.trainer(reference, SafeDeltaCallback(ROWS, RULE), folder.parent / "other").train()
    assert tiny.same(tiny.weights(model), tiny.weights(reference))


def test_base_files_replaced_during_training_are_noticed_and_the_tuned_weights_saved(folder, tmp_path):
    class Overwrite(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            model.save_pretrained(folder)

    model = loaded(folder)
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "run")
    trainer.add_callback(Overwrite())
    with pytest.raises(BaseWeightsError, match="were the files changed since") as raised:
        trainer.train()
    rescued = tmp_path / "run" / f"tuned-not-adjusted-{trainer.state.global_step}-1"
    assert str(rescued) in raised.value.__notes__[0]
    assert tiny.same(tiny.weights(loaded(rescued)), tiny.weights(model))


@pytest.fixture
def breaking(monkeypatch):
    """Make the adjustment fail with an error, from the second weight on."""

    def broken(error):
        calls, good = [], SafeDelta.transform

        def transform(self, *args):
            calls.append(1)
            if len(calls) > 1:
                raise error
            return good(self, *args)

        monkeypatch.setattr(SafeDelta, "transform", transform)

    return broken


def test_a_failed_adjustment_loses_nothing_and_can_be_repeated_without_training(tmp_path, breaking, monkeypatch):
    model = tiny.llama()
    callback = SafeDeltaCallback(ROWS, RULE)
    breaking(NumericalError("broken"))
    with pytest.raises(NumericalError, match="broken"):
        tiny.trainer(model, callback, tmp_path / "run").train()
    monkeypatch.undo()
    assert tiny.same(tiny.weights(model), trained(tiny.llama(), tmp_path / "plain"))
    report = callback.adjust(model, progress=False)
    reference = tiny.llama()
    tiny.trainer(reference, SafeDeltaCallback(ROWS, RULE), tmp_path / "other").train()
    assert report is callback.report and tiny.same(tiny.weights(model), tiny.weights(reference))


def test_every_failed_run_saves_its_own_tuned_weights(tmp_path, breaking):
    breaking(NumericalError("broken"))
    for seed in (0, 1):
        model = tiny.perturbed(tiny.llama(), seed=seed)
        with pytest.raises(NumericalError) as raised:
            tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path).train()
        rescued = tmp_path / f"tuned-not-adjusted-4-{seed + 1}"
        assert str(rescued) in raised.value.__notes__[0]
        assert tiny.same(tiny.weights(loaded(rescued)), tiny.weights(model))


def test_a_failed_rescue_does_not_hide_the_failure(tmp_path, breaking, monkeypatch):
    breaking(NumericalError("broken"))
    monkeypatch.setattr("safedelta_hf.folders.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(NumericalError, match="broken") as raised:
        tiny.trainer(tiny.llama(), SafeDeltaCallback(ROWS, RULE), tmp_path).train()
    assert "could not be saved" in raised.value.__notes__[0] and "disk full" in raised.value.__notes__[0]


def test_memory_running_out_in_the_adjustment_does_not_train_again(tmp_path, breaking):
    model, begins = tiny.llama(), []

    class Begins(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begins.append(state.global_step)

    breaking(RuntimeError("CUDA out of memory. Tried to allocate"))
    trainer = tiny.trainer(model, SafeDeltaCallback(ROWS, RULE), tmp_path / "run", auto_find_batch_size=True)
    trainer.add_callback(Begins())
    with pytest.raises(AdjustmentError, match="RuntimeError while adjusting the weights") as raised:
        trainer.train()
    assert begins == [0] and "out of memory" in str(raised.value.__cause__)
    assert tiny.same(tiny.weights(model), trained(tiny.llama(), tmp_path / "plain"))


def test_an_iterator_of_safety_data_serves_every_model(tmp_path):
    callback = SafeDeltaCallback(iter(ROWS), RULE, config=ProfileConfig(holdout=0.0))
    for _ in range(2):
        tiny.trainer(tiny.llama(), callback, tmp_path).train()
        assert callback.report.sequences == len(ROWS)


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"moment_memory": "lots"}, {"max_length": 0}])
def test_settings_out_of_range_stop_at_once(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        SafeDeltaCallback(ROWS, config=ProfileConfig(**settings))


def test_moments_may_be_kept_on_disk_while_training(tmp_path):
    one, other = tiny.llama(), tiny.llama()
    callback = SafeDeltaCallback(
        ROWS, RULE, config=ProfileConfig(moment_memory="2KB", offload_folder=str(tmp_path / "moments"))
    )
    tiny.trainer(one, callback, tmp_path / "one").train()
    assert list((tmp_path / "moments").rglob("*.f32"))
    tiny.trainer(other, SafeDeltaCallback(ROWS, RULE), tmp_path / "other").train()
    assert tiny.same(tiny.weights(one), tiny.weights(other))


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"neftune_noise_alpha": 5.0},
        {"eval_strategy": "epoch"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_it_works_with(settings, tmp_path):
    model, reference = tiny.llama().train(), tiny.llama().train()
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path / "run", **settings).train()
    expected = collect_profile(tiny.llama(), ROWS, progress=False)
    tolerance = 0.05 if "bf16" in settings else 1e-5
    for key, moment in expected.moments.items():
        found = callback.profile.moments[key].total
        assert (found - moment.total).norm() <= tolerance * moment.total.norm(), key
    trained(reference, tmp_path / "plain", **settings)
    adjust_model(reference, base=tiny.llama(), profile=callback.profile, rule=RULE, progress=False)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def test_pure_bfloat16_models_are_adjusted_in_bfloat16(folder, tmp_path):
    model = loaded(folder, dtype=torch.bfloat16)
    callback = SafeDeltaCallback(ROWS, RULE)
    tiny.trainer(model, callback, tmp_path / "run").train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert callback.report.base == str(folder) and set(callback.report.outcomes) == {"adjusted"}


def test_a_plain_module_works(tmp_path):
    model = tiny.Plain()
    callback = SafeDeltaCallback(ROWS, RULE, keep_tuned=tmp_path / "tuned")
    tiny.trainer(model, callback, tmp_path / "run").train()
    assert set(callback.report.outcomes) == {"adjusted"} and (tmp_path / "tuned" / "model.safetensors").exists()


def test_the_tokenizer_of_the_trainer_reads_conversations(tmp_path):
    callback = SafeDeltaCallback(tiny.conversations(), RULE)
    trainer = tiny.trainer(tiny.llama(), callback, tmp_path)
    trainer.processing_class = trainer.callback_handler.processing_class = tiny.tokenizer()
    trainer.data_collator = lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")}
    trainer.train()
    assert callback.profile.header.tokenizer is not None and callback.report.sequences == 6


def test_a_profile_may_be_given(tmp_path):
    profile = collect_profile(tiny.llama(), ROWS, progress=False)
    profile.save(tmp_path / "profile")
    one, other = tiny.llama(), tiny.llama()
    tiny.trainer(
        one, SafeDeltaCallback(profile=type(profile).load(tmp_path / "profile"), rule=RULE), tmp_path / "1"
    ).train()
    tiny.trainer(other, SafeDeltaCallback(ROWS, RULE), tmp_path / "2").train()
    assert tiny.same(tiny.weights(one), tiny.weights(other))


def stops_before_training(callback, message, error, tmp_path, model=None, **settings):
    trainer = tiny.trainer(model or tiny.llama(), callback, tmp_path / "run", **settings)
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_profile_of_another_base_stops_before_training(tmp_path):
    profile = collect_profile(tiny.perturbed(tiny.llama()), ROWS, progress=False)
    stops_before_training(SafeDeltaCallback(profile=profile), "made for another base", ProfileError, tmp_path)


def test_a_profile_of_another_architecture_stops_before_training(tmp_path):
    profile = collect_profile(tiny.gpt2(), ROWS, progress=False)
    stops_before_training(SafeDeltaCallback(profile=profile), "another base, GPT2LMHeadModel", ProfileError, tmp_path)


def test_a_profile_of_another_tokenizer_stops_before_training(tmp_path):
    profile = collect_profile(tiny.llama(), tiny.conversations(), tiny.tokenizer(), progress=False)
    other = tiny.tokenizer()
    other.chat_template = "{{ messages }}"
    callback = SafeDeltaCallback(profile=profile, processing_class=other)
    stops_before_training(callback, "another tokenizer", ProfileError, tmp_path)


def test_empty_safety_data_makes_no_callback():
    with pytest.raises(DataError, match="empty"):
        SafeDeltaCallback([])


def test_conversations_without_a_tokenizer_stop_before_training(tmp_path):
    stops_before_training(SafeDeltaCallback(tiny.conversations(16)), "no tokenizer", DataError, tmp_path)


def test_uncovered_parameters_stop_before_training(tmp_path):
    from tests.model.test_adjust import WithMixture

    class Model(WithMixture):
        def forward(self, input_ids, labels=None):
            logits = super().forward(input_ids)
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    callback = SafeDeltaCallback(ROWS, RULE)
    stops_before_training(callback, r"mixture: .*aten\._softmax", CoverageError, tmp_path, model=Model())
    frozen = Model()
    frozen.mixture.requires_grad_(False)
    tiny.trainer(frozen, SafeDeltaCallback(ROWS, RULE), tmp_path / "frozen").train()
    kept = Model()
    callback = SafeDeltaCallback(ROWS, RULE, treatment=Treatment(uncovered="keep"))
    tiny.trainer(kept, callback, tmp_path / "kept").train()
    assert callback.report.outcomes["kept"] == 1


def test_targets_choose_what_the_callback_adjusts(tmp_path):
    model = tiny.llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name or "down_proj" in name)
    callback = SafeDeltaCallback(
        ROWS, RULE, config=ProfileConfig(targets=["q_proj", "down_proj"], layers_to_transform=[1])
    )
    stops_before_training(callback, "not among the targets", CoverageError, tmp_path, model=model)
    callback = SafeDeltaCallback(
        ROWS,
        RULE,
        config=ProfileConfig(targets=["q_proj", "down_proj"], layers_to_transform=[1]),
        treatment=Treatment(uncovered="reset"),
    )
    tiny.trainer(model, callback, tmp_path / "run").train()
    outcomes = {record.parameter: record.outcome for record in callback.report.parameters}
    assert {name for name, outcome in outcomes.items() if outcome == "adjusted"} == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert outcomes["model.layers.0.self_attn.q_proj.weight"] == "reset"


def test_experts_and_convolutions_are_adjusted_in_a_trainer(tmp_path):
    for key in ("mixtral", "mamba2", "llama4_text"):
        model = architectures.tiny_model(key)
        callback = SafeDeltaCallback(ROWS, RULE)
        tiny.trainer(model, callback, tmp_path / key).train()
        assert set(callback.report.outcomes) <= {"adjusted", "unchanged"} and callback.report.changed_anything


@pytest.mark.parametrize("given", [{}, {"safety_dataset": ROWS, "profile": "p"}])
def test_exactly_one_source_of_moments_is_needed(given):
    with pytest.raises(ConfigurationError, match="either safety_dataset or profile"):
        SafeDeltaCallback(**given)


def test_a_callback_that_has_not_seen_training_says_so():
    with pytest.raises(BaseWeightsError, match="has not seen training start"):
        SafeDeltaCallback(ROWS).adjust(tiny.llama())
