"""What becomes of a training with the callback on several processes, besides its weights; run under torchrun.

python -m tests.programs.lifecycle BACKEND FOLDER
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer

from safedelta_hf import EvaluationCallback, SafeDelta, SafeDeltaCallback
from safedelta_hf.errors import ConfigurationError, RankError
from safedelta_hf.testbed import CASES, attack_questions, load_aligned, tokenize
from tests.fixtures import tiny
from tests.programs import shim, training
from tests.programs.leaving import leave_together

HARMFUL = [{"messages": question.messages} for question in attack_questions(4)]
NOTHING_KEPT = SafeDelta(strength=0.0)


def trainer(backend, folder, rule, **changes):
    callback = SafeDeltaCallback(training.ROWS, rule)
    settings = training.BACKENDS[backend] | changes
    if "fsdp_config" in settings:
        settings["fsdp_config"] = settings["fsdp_config"] | {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    return Trainer(
        model=tiny.llama(),
        args=tiny.arguments(folder / "run", **{"per_device_train_batch_size": 4} | settings),
        train_dataset=tiny.rows(16, seed=2, length=10),
        eval_dataset=tiny.rows(8, seed=3, length=10),
        callbacks=[callback],
    )


def is_base(model):
    """With nothing kept, what was written is seen; unused embedding rows keep their delta."""
    base = tiny.llama()
    ended = training.whole_weights(model)
    return all(torch.equal(value, base.get_parameter(name)) for name, value in ended.items() if "embed" not in name)


def second_train(backend, folder):
    run = trainer(backend, folder, NOTHING_KEPT)
    for _ in range(2):
        run.train()
        assert is_base(run.model)


def best_model(backend, folder):
    """The evaluation at the last step leaves the last group of FSDP2 gathered; what is written to it then is lost."""
    steps = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    run = trainer(backend, folder, NOTHING_KEPT, **steps)
    run.train()
    assert run.state.best_model_checkpoint
    assert is_base(run.model)
    run.save_model(str(folder / "final"))
    ended = training.whole_weights(run.model)
    if run.is_world_process_zero():
        saved = tiny.weights(AutoModelForCausalLM.from_pretrained(folder / "final"))
        assert tiny.same(saved, ended)


def evaluation(backend, folder):
    model, tokenizer = load_aligned()
    callback = EvaluationCallback(harmful=HARMFUL, every="epoch", max_new_tokens=4)
    run = Trainer(
        model=model,
        args=tiny.arguments(folder, per_device_train_batch_size=2, max_steps=2, **training.BACKENDS[backend]),
        train_dataset=tokenize(CASES["harmful"].examples()[:4], tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    if backend == "ddp":
        run.train()
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, (callback.evaluation.metrics(), run.state.log_history))
        assert found[0][0] == found[1][0] and any("safedelta" in key for key in found[1][1][0] | found[1][1][1])
        return
    try:
        run.train()
    except (ConfigurationError, RankError) as error:
        assert "sharded" in str(error)
        return
    raise AssertionError("nothing was raised")


def evaluation_fails(backend, folder):
    """Only the main process generates; the others hear of what befalls it."""

    def judge(*_):
        raise OSError("broken on purpose")

    model, tokenizer = load_aligned()
    callback = EvaluationCallback(harmful=HARMFUL, judge=judge, max_new_tokens=4)
    args = tiny.arguments(folder, **training.BACKENDS[backend])
    run = Trainer(model=model, args=args, train_dataset=[], processing_class=tokenizer, callbacks=[callback])
    try:
        run.callback_handler.on_train_end(run.args, run.state, run.control)
    except Exception as error:
        assert "broken on purpose" in str(error)
        assert isinstance(error, RankError) == (dist.get_rank() == 1)
        return
    raise AssertionError("nothing was raised")


def experts(backend, folder):
    """An adapter that FSDP1 cannot train is refused before the first step; one beside the experts is adjusted."""
    _, run = training.trainer(backend, folder / "refused", world=dist.get_world_size(), name="mixtral", lora=True)
    try:
        run.train()
    except ConfigurationError as error:
        assert "peft/issues/3080" in str(error) and "target_modules" in str(error), error
        assert run.state.global_step == 0
    else:
        raise AssertionError("nothing was raised")
    callback, run = training.trainer(
        backend, folder / "adjusted", world=dist.get_world_size(), name="mixtral", lora="attention"
    )
    with warnings.catch_warnings(record=True) as said:
        run.train()
    assert callback.report.changed_anything
    warned = any("save_model() writes an empty one" in str(warning.message) for warning in said)
    assert warned == (dist.get_rank() == 0)


CHECKS = {
    "ddp": (second_train, best_model, evaluation, evaluation_fails),
    "fsdp1": (experts,),
    "fsdp2": (second_train, best_model, evaluation),
}


def main(backend, folder):
    if backend != "ddp":
        shim.install()
    from accelerate import PartialState

    PartialState(cpu=backend == "ddp")
    for check in CHECKS[backend]:
        check(backend, Path(folder) / check.__name__)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"passed {check.__name__}", flush=True)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
