"""Evaluation during training: when, on which model, under which names, and without a trace."""

import random

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from safedelta_hf import EvaluationCallback, SafeDelta, SafeDeltaCallback
from safedelta_hf.errors import ConfigurationError, DataError, EvaluationError
from safedelta_hf.evaluation import Questions, evaluate_model, final_answer
from safedelta_hf.hf.evaluation import require_whole
from safedelta_hf.testbed import CASES, attack_questions, load_aligned, safety_data, skill_questions, tokenize
from tests.fixtures import tiny

HARMFUL = [{"messages": question.messages} for question in attack_questions(12)]
TASK = [question.conversation() for question in skill_questions(7)]
REFUSALS = safety_data(12)
KEPT = {"harmful": HARMFUL, "refusals": REFUSALS, "task_questions": TASK, "score": final_answer}


def trainer(output, callbacks, model=None, examples=60, **changes):
    loaded, tokenizer = load_aligned()
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 10, "learning_rate": 5e-4} | changes
    return Trainer(
        model=model or loaded,
        args=tiny.arguments(output, **settings),
        train_dataset=tokenize(CASES["harmful"].examples()[:examples], tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def logged(run):
    names = "safedelta/eval_attack_success"
    return [(entry["step"], entry[names]) for entry in run.state.log_history if names in entry]


class Tracker(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "safedelta/eval_attack_success" in logs:
            self.seen.append(state.global_step)


@pytest.mark.parametrize(
    ("every", "steps"), [("epoch", [6, 12]), (5, [5, 10, 12]), (6, [6, 12]), (None, [12]), (100, [12])]
)
def test_scores_are_logged_when_asked_for_and_once_for_the_model_that_training_leaves(every, steps, tmp_path):
    tracker = Tracker()
    run = trainer(tmp_path, [EvaluationCallback(**KEPT, every=every), tracker])
    run.train()
    assert [step for step, _ in logged(run)] == steps == tracker.seen


def test_scores_are_those_of_an_evaluation_of_the_trained_model(tmp_path):
    callback = EvaluationCallback(**KEPT, max_new_tokens=24)
    run = trainer(tmp_path, [callback])
    run.train()
    questions = Questions.read(**{name.removesuffix("_questions"): asked for name, asked in KEPT.items()})
    expected = evaluate_model(run.model, run.processing_class, questions, max_new_tokens=24, progress=False)
    found = next(entry for entry in reversed(run.state.log_history) if "safedelta/eval_attack_success" in entry)
    assert expected.metrics("safedelta/eval_").items() <= found.items()
    assert callback.evaluation.scores == expected.scores
    assert found["safedelta/eval_attack_success"] > 0.5


class Watch(TrainerCallback):
    """Losses and random numbers that tell whether training went another way."""

    def __init__(self):
        self.draws = []

    def on_step_end(self, args, state, control, **kwargs):
        self.draws.append((float(torch.rand(())), random.random()))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"neftune_noise_alpha": 5.0}])
def test_training_goes_the_same_way_with_and_without_it(tmp_path, settings):
    results = []
    for callbacks in ([], [EvaluationCallback(**KEPT, every=2)]):
        model, watch = load_aligned()[0], Watch()
        model.config.attention_dropout = 0.1
        before = model.generation_config
        run = trainer(tmp_path, [*callbacks, watch], model=model, examples=30, **settings)
        run.train()
        assert model.generation_config is before and model.training
        results.append((tiny.weights(model), watch.draws, model.config.use_cache, run.processing_class.padding_side))
    assert tiny.same(results[0][0], results[1][0]) and results[0][1:] == results[1][1:]


def test_after_a_safe_delta_callback_the_last_scores_are_those_of_the_adjusted_model(tmp_path):
    evaluation = EvaluationCallback(**KEPT)
    run = trainer(
        tmp_path,
        [SafeDeltaCallback(safety_data(), SafeDelta(strength=0.3)), evaluation],
        examples=100,
        num_train_epochs=5,
    )
    run.train()
    steps, shares = zip(*logged(run), strict=True)
    assert steps == (10, 20, 30, 40, 50, 50)
    assert shares[-2] > 0.8 and shares[-1] < 0.2


def test_adapters_are_measured_as_they_train_and_left_as_they_were(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load_aligned()[0]
    settings = base.generation_config
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=16, lora_alpha=64))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run = trainer(
        tmp_path,
        [EvaluationCallback(**KEPT, every=20)],
        model=model,
        examples=100,
        num_train_epochs=4,
        learning_rate=3e-3,
    )
    run.train()
    assert logged(run)[-1][1] > 0.5
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert base.generation_config is settings and model.generation_config is settings


def test_only_the_first_examples_are_used(tmp_path):
    callback = EvaluationCallback(**KEPT, examples=3)
    trainer(tmp_path, [callback], num_train_epochs=1).train()
    assert {score.count for score in callback.evaluation.scores.values()} == {3}


def test_other_processes_neither_generate_nor_log(tmp_path, monkeypatch):
    callback = EvaluationCallback(harmful=HARMFUL, every=1)
    run = trainer(tmp_path, [callback], num_train_epochs=1)
    run.state.is_world_process_zero = False
    monkeypatch.setattr(run.model, "generate", lambda **_: pytest.fail("generated"))
    callback.on_step_end(run.args, run.state, run.control, model=run.model, processing_class=run.processing_class)
    callback.on_train_end(run.args, run.state, run.control, model=run.model, processing_class=run.processing_class)
    assert callback.evaluation is None and not run.state.log_history


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_runs_stop_before_training(tmp_path, monkeypatch, kind):
    run = trainer(tmp_path, [EvaluationCallback(harmful=HARMFUL)])
    monkeypatch.setattr(run.args.distributed_state, "distributed_type", kind)
    with pytest.raises(ConfigurationError, match=f"weights of this run are sharded .{kind.value}"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)


def test_weights_that_are_sharded_without_the_trainers_knowledge_are_found(llama, tmp_path):
    args = tiny.arguments(tmp_path)
    require_whole(args, llama)
    zero_3 = tiny.llama()
    zero_3.lm_head.weight.ds_id = 0
    with pytest.raises(ConfigurationError, match="sharded"):
        require_whole(args, zero_3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        llama.lm_head.weight = torch.nn.Parameter(distribute_tensor(llama.lm_head.weight.data, mesh, [Shard(0)]))
        with pytest.raises(ConfigurationError, match="sharded"):
            require_whole(args, llama)
    finally:
        torch.distributed.destroy_process_group()


def stops_before_training(tmp_path, callback, message, error=ConfigurationError, **changes):
    run = trainer(tmp_path, [callback], **changes)
    with pytest.raises(error, match=message):
        run.train()
    assert run.state.global_step == 0


def test_what_cannot_be_evaluated_stops_before_training(tmp_path):
    run = tiny.trainer(tiny.llama(), EvaluationCallback(harmful=["a"]), tmp_path)
    with pytest.raises(ConfigurationError, match="there is no tokenizer"):
        run.train()
    run = tiny.trainer(tiny.Plain(), EvaluationCallback(harmful=["a"]), tmp_path)
    with pytest.raises(ConfigurationError, match=r"Plain has no generate\(\)"):
        run.train()
    stops_before_training(
        tmp_path, EvaluationCallback(refusals=[{"messages": HARMFUL[0]["messages"]}]), "row 0", DataError
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to ask"),
        ({"harmful": ["a"], "every": "step"}, "every='step'"),
        ({"harmful": ["a"], "every": 0}, "every=0"),
        ({"harmful": ["a"], "every": True}, "every=True"),
        ({"harmful": ["a"], "examples": 0}, "examples=0"),
        ({"harmful": ["a"], "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"harmful": ["a"], "batch_size": 0}, "batch_size=0"),
        ({"task_questions": ["a"]}, "task questions and score"),
    ],
)
def test_bad_settings_stop_at_once(given, message):
    with pytest.raises(ConfigurationError, match=message):
        EvaluationCallback(**given)
    with pytest.raises(DataError, match="harmful: there is no file"):
        EvaluationCallback(harmful="absent.jsonl")


def test_memory_running_out_does_not_look_like_a_batch_that_is_too_large(tmp_path, monkeypatch):
    run = trainer(tmp_path, [EvaluationCallback(harmful=HARMFUL, every=1)], auto_find_batch_size=True)

    def fail(**_):
        raise RuntimeError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(run.model, "generate", fail)
    with pytest.raises(
        EvaluationError, match="RuntimeError while EvaluationCallback measured at step 1 .*memory ran out"
    ) as raised:
        run.train()
    assert "out of memory" in str(raised.value.__cause__) and run.model.training
