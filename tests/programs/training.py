"""A fine-tuning with the callback, as a user's script has it; run under torchrun or accelerate launch.

python -m tests.programs.training BACKEND FOLDER CASE ...
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations import deepspeed

from safedelta_hf import Ridge, SafeDelta, SafeDeltaCallback, TaskRidge, Treatment
from safedelta_hf.modules.names import canonical
from tests.fixtures import architectures, tiny
from tests.programs import shim

ROWS = tiny.rows(23, seed=1)
RULES = {
    "safe_delta": lambda: SafeDelta(strength=3.0),
    "ridge": lambda: Ridge(strength=2.0),
    "task_ridge": lambda: TaskRidge(strength=2.0),
    "auto": lambda: Ridge(strength="auto"),
}
MODELS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tied=True),
    "gpt2": tiny.gpt2,
    "mixtral": lambda: architectures.tiny_model("mixtral"),
}


def zero(stage):
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }


BACKENDS = {
    "single": {"use_cpu": True},
    "ddp": {"use_cpu": True},
    "native": {"use_cpu": True, "save_only_model": True},
    "fsdp2": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}},
    "fsdp1": {"use_cpu": False, "fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
    **{f"zero{stage}": {"use_cpu": False, "deepspeed": zero(stage)} for stage in (1, 2, 3)},
}
LAYERS = {
    "llama": "LlamaDecoderLayer",
    "tied": "LlamaDecoderLayer",
    "gpt2": "GPT2Block",
    "mixtral": "MixtralDecoderLayer",
}


def without_dropout(model):
    """Ranks draw their own masks, so with it a run on several is another run."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def distributed_by_transformers(model, folder, world):
    from transformers.distributed import DistributedConfig

    saved = folder / "model"
    model.save_pretrained(saved)  # the main process writes
    dist.barrier()
    return AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(fsdp_size=world))


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


CASES = {
    "full": {},
    "selected": {"rule": "safe_delta"},
    "task": {"rule": "task_ridge"},
    "measured": {"rule": "auto"},
    "conv1d": {"name": "gpt2", "rule": "safe_delta"},
    "tied": {"name": "tied"},
    "experts": {"name": "mixtral"},
    "one_example": {"safety": 1},
    "from_files": {"name": "saved"},
    "lora": {"lora": True, "rule": "safe_delta"},
    "lora_measured": {"lora": True, "rule": "auto"},
}


def trainer(backend, folder, *, name="llama", rule="ridge", lora=False, safety=23, world=1, **changes):
    settings = dict(BACKENDS[backend])
    if "fsdp_config" in settings:
        layer = LAYERS.get(name, "LlamaDecoderLayer")
        settings["fsdp_config"] = settings["fsdp_config"] | {"transformer_layer_cls_to_wrap": layer}
    # With SGD, what the order of summation does to a gradient is not blown up, as Adam does with small ones.
    training = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "per_device_train_batch_size": 8 // world,
        "save_only_model": True,
    }
    args = tiny.arguments(folder, **training | settings | changes)
    model = saved(folder) if name == "saved" else made_whole(MODELS[name])
    if backend == "native":
        model = distributed_by_transformers(model, folder, world)
    model = adapted(model) if lora else model
    callback = SafeDeltaCallback(ROWS[:safety], RULES[rule](), treatment=Treatment(uncovered="keep"))
    return callback, Trainer(
        model=model,
        args=args,
        train_dataset=tiny.rows(16, seed=2, length=10),
        eval_dataset=tiny.rows(8, seed=3, length=10),
        callbacks=[callback],
    )


def made_whole(make):
    """A model as it is made before there are arguments; transformers remembers those of runs before."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    model = without_dropout(make())
    deepspeed._hf_deepspeed_config_weak_ref = config
    return model


def saved(folder):
    """A model from files, as users have it: ZeRO 3 shares it out while it is read, and its base is read again."""
    source = folder.parent / "saved"
    with PartialState().main_process_first():
        if not source.exists():
            made_whole(tiny.llama).save_pretrained(source)
    return tiny.loaded(source)


def whole_weights(model):
    """What all ranks hold together, by the means of the backend itself; of a LoRA, what was trained."""
    found = {}
    with gathered(model):
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[canonical(name)] = value.cpu().clone().contiguous()
    return found


def gathered(model):
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, writeback=False)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(model.parameters()))
    return nullcontext()


def train(backend, folder, case, world):
    callback, run = trainer(backend, folder / "run", world=world, **CASES[case])
    run.train()
    found = whole_weights(run.model)
    if backend != "fsdp1":  # torch cannot move its state to the CPU where it is there already
        run.save_model(folder / f"{case}-saved")
    if run.is_world_process_zero():
        require_saved(folder / f"{case}-saved", found)
        save_file(found, folder / f"{case}.safetensors")
        callback.report.save(folder / f"{case}.json")


def require_saved(folder, found):
    """What the Trainer saves, where it is a whole model, is what was adjusted."""
    if (folder / "config.json").exists():
        again = made_whole(lambda: AutoModelForCausalLM.from_pretrained(folder))
        for name, value in again.named_parameters():
            assert torch.equal(value, found[name]), name


def main(backend, folder, *cases):
    if backend.startswith("zero"):
        shim.deepspeed_on_cpu()
    if not BACKENDS[backend]["use_cpu"]:
        shim.install()
    state = PartialState(cpu=BACKENDS[backend]["use_cpu"])
    for case in cases:
        train(backend, Path(folder), case, state.num_processes)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
