"""A fine-tuning with the callback, as a user's script has it; run under torchrun or accelerate launch.

python -m tests.distributed.training BACKEND FOLDER [SETTING ...]
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

from safedelta_hf import Ridge, SafeDelta, SafeDeltaCallback, TaskRidge, Treatment
from tests import tiny
from tests.distributed import shim

ROWS = tiny.rows(23, seed=1)
RULES = {
    "safe_delta": lambda: SafeDelta(strength=3.0),
    "ridge": lambda: Ridge(strength=2.0),
    "task_ridge": lambda: TaskRidge(strength=2.0),
    "auto": lambda: Ridge(strength="auto"),
}
MODELS = {"llama": tiny.llama, "tied": lambda: tiny.llama(tied=True), "gpt2": tiny.gpt2}
BACKENDS = {
    "single": {"use_cpu": True},
    "ddp": {"use_cpu": True},
    "fsdp2": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
}
LAYERS = {"llama": "LlamaDecoderLayer", "tied": "LlamaDecoderLayer", "gpt2": "GPT2Block"}


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", modules_to_save=["embed_tokens"])
    adapter = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapter


def trainer(backend, folder, *, name="llama", rule="ridge", lora=False, safety=ROWS, world=1, **changes):
    model = MODELS[name]()
    model = adapted(model) if lora else model
    settings = {**BACKENDS[backend]}
    if "fsdp_config" in settings:
        settings["fsdp_config"] = {**settings["fsdp_config"], "transformer_layer_cls_to_wrap": LAYERS[name]}
    # With SGD, what the order of summation does to a gradient is not blown up, as Adam does with small ones.
    training = {"optim": "sgd", "learning_rate": 0.3, "per_device_train_batch_size": 8 // world, "save_only_model": True}
    callback = SafeDeltaCallback(safety, RULES[rule](), treatment=Treatment(uncovered="keep"))
    return callback, Trainer(
        model=model,
        args=tiny.arguments(folder, **{**training, **settings, **changes}),
        train_dataset=tiny.rows(16, seed=2, length=10),
        eval_dataset=tiny.rows(8, seed=3, length=10),
        callbacks=[callback],
    )


def whole_weights(model):
    """What all ranks hold together, by the means of the backend itself."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()
    return found


def main(backend, folder, *flags):
    settings = dict(flag.split("=") for flag in flags)
    if backend not in ("single", "ddp"):
        shim.install()
    from accelerate import PartialState

    state = PartialState(cpu=backend in ("single", "ddp"))
    safety = ROWS[: int(settings.pop("safety", len(ROWS)))]
    settings["lora"] = settings.get("lora") == "yes"
    callback, run = trainer(backend, Path(folder) / "run", world=state.num_processes, safety=safety, **settings)
    run.train()
    found = whole_weights(run.model)
    if state.is_main_process:
        save_file({name: value.contiguous() for name, value in found.items()}, Path(folder) / "weights.safetensors")
        callback.report.save(Path(folder) / "report.json")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
