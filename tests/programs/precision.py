"""A fine-tuning in bf16 that moves nothing, on several processes: no drift is measured.

python -m tests.programs.precision BACKEND FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import training_args

from tests.programs import shim, training
from tests.programs.leaving import leave_together


def measure(backend, folder, *, lora, world):
    training.adapted = unmoved  # its deltas are not zero
    callback, run = training.trainer(
        backend, folder, rule="auto", lora=lora, world=world, learning_rate=0.0, bf16=True, save_strategy="no"
    )
    run.train()
    search = callback.report.search
    assert [(trial.lost, trial.probability_lost) for trial in search.trials] == [(0, 0.0)], search
    assert search.noise.probability_lost > 0
    return search.noise.precision


def unmoved(model, _):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))


def main(backend, folder):
    if backend.startswith("zero"):
        shim.deepspeed_on_cpu()
    if not training.BACKENDS[backend]["use_cpu"]:
        shim.install()
        training_args.is_torch_bf16_gpu_available = lambda: True
    state = PartialState(cpu=training.BACKENDS[backend]["use_cpu"])
    read = [measure(backend, Path(folder) / str(lora), lora=lora, world=state.num_processes) for lora in (False, True)]
    if state.is_main_process:
        print("read in", *read)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
