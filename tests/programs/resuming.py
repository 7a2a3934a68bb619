"""A training script as users have it: run again after it was killed, it goes on where its last checkpoint is.

python -m tests.programs.resuming BACKEND FOLDER[,FOLDER] KIND [POINT CALL [RANK]]

Of two folders, the first gets a run that nothing befalls, before the one in the second is killed.
"""

import importlib
import os
import signal
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, Trainer

from safedelta_hf import SafeDeltaCallback, TaskRidge
from tests.fixtures import tiny
from tests.programs import shim
from tests.programs.leaving import leave_together

ROWS = tiny.rows(23, seed=1)
STEPS, EVERY = 6, 2

POINTS = {
    "capture": "safedelta_hf.capture.collector:MomentCollector.product",
    "step": "transformers:Trainer.training_step",
    "checkpoint_model": "transformers:Trainer._save_optimizer_and_scheduler",
    "checkpoint_state": "transformers:TrainerState.save_to_json",
    "keep_tuned": "safedelta_hf.hf.tuned:_save",
    "replace": "safedelta_hf.weights.journal:Journal.replace",
    "save_model": "transformers:Trainer._save",
}
"""Where a run can be killed: at some call of these."""


def kill_at(point, call, rank=None):
    """Let processes be killed by the system at the end of their n-th call of a function: one rank, or all of them."""
    module, _, path = POINTS[point].partition(":")
    *owner, name = path.split(".")
    place = importlib.import_module(module)
    for part in owner:
        place = getattr(place, part)
    original, calls = getattr(place, name), []

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(name)
        if len(calls) == int(call) and rank in (None, os.environ.get("RANK")):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, wrapped)


def last_checkpoint(output):
    """The Trainer writes a checkpoint's state last; without it the checkpoint is half-written."""
    complete = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def adapted(model):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules="all-linear"))


def settings(backend):
    if backend == "fsdp2":
        wrap = "LlamaDecoderLayer"
        return {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": wrap}}
    return {"use_cpu": True}


def train(backend, folder, kind):
    folder, world = Path(folder), int(os.environ.get("WORLD_SIZE", 1))
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    trainer = Trainer(
        model=adapted(model) if kind == "lora" else model,
        args=tiny.arguments(
            folder / "run",
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=EVERY,
            per_device_train_batch_size=8 // world,
            **settings(backend),
        ),
        train_dataset=tiny.rows(16, seed=2, length=10),
        callbacks=[SafeDeltaCallback(ROWS, TaskRidge(strength=2.0), keep_tuned=folder / "tuned")],
    )
    last = last_checkpoint(folder / "run")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(folder / "final")
    print(f"started at {last.name if last else 'the base'} and ended")


def main(backend, folders, kind, *kill):
    if backend == "fsdp2":
        shim.install()
    *whole, folder = str(folders).split(",")
    for each in whole:
        train(backend, each, kind)
    if kill:
        kill_at(*kill)
    train(backend, folder, kind)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
