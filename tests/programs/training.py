"""A fine-tuning with the callback, as a user's script has it; run under torchrun or accelerate launch.

python -m tests.programs.training BACKEND FOLDER CASE ...
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.integrations import deepspeed

from safedelta_hf import Ridge, SafeDelta, SafeDeltaCallback, TaskRidge, Treatment
from safedelta_hf.modules.names import canonical
from safedelta_hf.rules import AutoStrength
from tests.fixtures import architectures, tiny
from tests.programs import shim
from tests.programs.leaving import leave_together

ROWS = tiny.rows(23, seed=1)
RULES = {
    "safe_delta": lambda: SafeDelta(strength=3.0),
    "ridge": lambda: Ridge(strength=2.0),
    "task_ridge": lambda: TaskRidge(strength=2.0),
    "auto": lambda: Ridge(strength="auto"),
    "strict": lambda: Ridge(strength=AutoStrength(lost=4e-3, confidence=1e-3)),
}
MODELS = {
    "llama": tiny.llama,
    "saved": tiny.llama,
    "tied": lambda: tiny.llama(tied=True, vocab_size=tiny.VOCABULARY - 1),  # no number of processes here divides it
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
    "fsdp2": {
        "use_cpu": False,
        "fsdp": True,
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    },
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
    return without_dropout(
        AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(fsdp_size=world))
    )


ADAPTERS = {
    True: {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
}


def adapted(model, kind=True):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    adapter = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, **ADAPTERS[kind]))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.05)
    return adapter


CASES = {
    "full": {},
    "selected": {"rule": "safe_delta"},
    "task": {"rule": "task_ridge"},
    "measured": {"rule": "auto"},
    "conv1d": {"name": "gpt2", "rule": "safe_delta"},
    "tied": {"name": "tied", "rule": "strict"},
    "experts": {"name": "mixtral"},
    "one_example": {"safety": 1},
    "from_files": {"name": "saved"},
    "lora": {"lora": True, "rule": "safe_delta"},
    "lora_measured": {"lora": True, "rule": "auto"},
    "lora_linear": {"lora": "linear", "rule": "auto"},
    "lora_tied": {"name": "tied", "lora": "embeddings", "rule": "auto"},
    "lora_experts": {"name": "mixtral", "lora": True, "rule": "auto"},
}


def trainer(backend, folder, *, name="llama", rule="ridge", lora=False, safety=23, world=1, keep_tuned=None, **changes):
    settings = dict(BACKENDS[backend])
    if "fsdp_config" in settings:
        layer = LAYERS.get(name, "LlamaDecoderLayer")
        settings["fsdp_config"] = settings["fsdp_config"] | {"transformer_layer_cls_to_wrap": layer}
    # With SGD, what the order of summation does to a gradient is not blown up, as Adam does with small ones.
    training = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "per_device_train_batch_size": 12 // world,
        "save_only_model": True,
    }
    args = tiny.arguments(folder, **training | settings | changes)
    model = saved(folder) if name == "saved" else made_whole(MODELS[name])
    if backend == "native":
        model = distributed_by_transformers(model, folder, world)
    model = adapted(model, lora) if lora else model
    treatment = Treatment(uncovered="keep")
    callback = SafeDeltaCallback(ROWS[:safety], RULES[rule](), treatment=treatment, keep_tuned=keep_tuned)
    return callback, Trainer(
        model=model,
        args=args,
        train_dataset=tiny.rows(24, seed=2, length=10),
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
    reshard(model)
    with gathered(model):
        for name, parameter in model.named_parameters():
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[canonical(name)] = value.cpu().clone().contiguous()
    return found


def reshard(model):
    """Undo what a forward pass leaves: a tied parameter that is gathered is another one in each of its places."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(model):
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, writeback=False)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(model.parameters()))
    return nullcontext()


def own_part(model):
    """What this rank holds."""
    # ZeRO 3 may have gathered what stands for a parameter in the model.
    parts = {name: getattr(value, "ds_tensor", value).detach() for name, value in model.named_parameters()}
    return {name: (part.to_local() if hasattr(part, "to_local") else part).clone() for name, part in parts.items()}


class Before(TrainerCallback):
    """Remembers what training ends with, and lets it diverge on one rank."""

    def __init__(self, *, diverges=False):
        self.diverges, self.own, self.whole = diverges, None, None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        reshard(model)
        if self.diverges and dist.get_rank() == 1:
            part = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
            (part.to_local() if hasattr(part, "to_local") else part)[-1, -1] = float("nan")
        self.own, self.whole = own_part(model), whole_weights(model)


def train(backend, folder, case, world):
    """Train, and compare what was saved before and after the adjustment with what the model held."""
    tuned, ended = folder / f"{case}-tuned", folder / f"{case}-saved"
    callback, run = trainer(backend, folder / "run", world=world, keep_tuned=tuned, **CASES[case])
    before = Before()
    run.callback_handler.callbacks.insert(0, before)
    run.train()
    found = whole_weights(run.model)
    if backend != "fsdp1":  # torch cannot move its state to the CPU where it is there already
        run.save_model(ended)
    if run.is_world_process_zero():
        assert not tiny.same(found, before.whole)
        require_saved(tuned, before.whole, case)
        if backend != "fsdp1":
            require_saved(ended, found, case)
        save_file(found, folder / f"{case}.safetensors")
        callback.report.save(folder / f"{case}.json")
    left = {path.name for path in folder.iterdir() if path.name.startswith("_safedelta-")}
    assert not left, left


def require_saved(folder, expected, case):
    """What was saved loads, and is what the model held."""
    make = MODELS[CASES[case].get("name", "llama")]
    if CASES[case].get("lora"):
        loaded = made_whole(lambda: PeftModel.from_pretrained(without_dropout(make()), folder))
    else:
        loaded = made_whole(lambda: AutoModelForCausalLM.from_pretrained(folder))
    weights = tiny.weights(loaded)
    assert weights.keys() == expected.keys(), weights.keys() ^ expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


def start(backend):
    """Make a process one of a run of that kind; returns how many there are."""
    if backend.startswith("zero"):
        shim.deepspeed_on_cpu()
    if not BACKENDS[backend]["use_cpu"]:
        shim.install()
    return PartialState(cpu=BACKENDS[backend]["use_cpu"]).num_processes


def main(backend, folder, *cases):
    world = start(backend)
    for case in cases:
        train(backend, Path(folder), case, world)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
