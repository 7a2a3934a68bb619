"""Fine-tunings whose adjusted model is polished; run under torchrun.

python -m tests.programs.polishing BACKEND FOLDER CASE ...
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer

from safedelta_hf import PolishConfig, Ridge, SafeDeltaCallback
from safedelta_hf.errors import ConfigurationError
from tests.fixtures import tiny
from tests.programs import training
from tests.programs.leaving import leave_together
from tests.programs.training import BACKENDS, MODELS, adapted, distributed_by_transformers, made_whole, whole_weights

CASES = {
    "full": {},
    "tied": {"name": "tied"},
    "lora": {"lora": "linear"},
    "undone": {"rate": 30.0},
    "bf16": {"bf16": True},
}
POLISH = {"steps": 4, "rate": 10.0, "batch_size": 4, "tolerance": 10.0}


def trainer(backend, folder, world, *, name="llama", lora=None, bf16=False, **polish):
    settings = dict(BACKENDS[backend])
    if "fsdp_config" in settings:
        layer = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
        settings["fsdp_config"] = settings["fsdp_config"] | layer
    # With SGD, what the order of summation does to a gradient is not blown up, as Adam does with small ones.
    steps = {"optim": "sgd", "learning_rate": 0.3, "per_device_train_batch_size": 12 // world, "save_only_model": True}
    args = tiny.arguments(folder, **steps | settings, bf16=bf16)
    model = made_whole(MODELS[name])
    model = distributed_by_transformers(model, folder, world) if backend == "native" else model
    callback = SafeDeltaCallback(
        training.ROWS,
        Ridge(strength=2.0),
        ordinary_dataset=tiny.rows(17, seed=9),
        polish=PolishConfig(**POLISH | polish),
    )
    return callback, Trainer(
        model=adapted(model, lora) if lora else model,
        args=args,
        train_dataset=tiny.rows(24, seed=2, length=10),
        callbacks=[callback],
    )


def train(backend, folder, case, world):
    callback, run = trainer(backend, folder / "run", world, **CASES[case])
    run.train()
    found = whole_weights(run.model)
    if run.is_world_process_zero():
        save_file(found, folder / f"{case}.safetensors")
        callback.report.save(folder / f"{case}.json")


def refused(backend, folder, world):
    try:
        trainer(backend, folder / "run", world)[1].train()
    except ConfigurationError as error:
        assert "polish trains the adjusted model with a second Trainer" in str(error), error
        print("refused")


def main(backend, folder, *cases):
    world = training.start(backend)
    torch.manual_seed(0)
    if backend.startswith("zero"):
        refused(backend, Path(folder), world)
    for case in cases:
        train(backend, Path(folder), case, world)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
