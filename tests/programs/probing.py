"""A fine-tuning whose steps are probed; run under torchrun.

python -m tests.programs.probing BACKEND FOLDER
"""

import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import DataCollatorForSeq2Seq, Trainer

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.training import SafetyProbeConfig, with_safety_probe
from tests.fixtures import tiny
from tests.programs import shim
from tests.programs.training import BACKENDS, adapted, gathered, made_whole, whole_weights
from tests.training.test_preferences import PLAIN

CASES = {"full": {}, "lora": {"lora": True}, "literal": {"normalise": "none", "beta": 30.0, "loss": "difference"}}


def trainer(backend, folder, world, *, lora=False, **changes):
    settings = dict(BACKENDS[backend])
    if "fsdp_config" in settings:
        settings["fsdp_config"] |= {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    training = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
    }
    model = made_whole(tiny.llama)
    # Steps of the size of rounding differ: so the move is a large one, and an odd number of pairs is shared out.
    probe = SafetyProbeConfig(**{"pairs": PLAIN, "batch_size": 3, "epsilon": 1e-2} | changes)
    return with_safety_probe(Trainer)(
        model=adapted(model) if lora else model,
        args=tiny.arguments(folder, **training | settings),
        train_dataset=tiny.rows(32, seed=2),  # of unequal lengths, so that ranks count different tokens
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        processing_class=tiny.tokenizer(),
        probe=probe,
    )


def train(backend, folder, case, world):
    run = trainer(backend, folder / "run", world, **CASES[case])
    run.train()
    found = whole_weights(run.model)
    if run.is_world_process_zero():
        save_file(found, folder / f"{case}.safetensors")


def refused(backend, folder, world):
    run = trainer(backend, folder / "run", world)
    try:
        run.train()
    except ConfigurationError as error:
        assert "safety probe" in str(error), error
        print("refused")
    with gathered(run.model):
        pass


def main(backend, folder):
    if backend.startswith("zero"):
        shim.deepspeed_on_cpu()
    if not BACKENDS[backend]["use_cpu"]:
        shim.install()
    state = PartialState(cpu=BACKENDS[backend]["use_cpu"])
    if backend == "ddp":
        for case in CASES:
            train(backend, Path(folder), case, state.num_processes)
    else:
        refused(backend, Path(folder), state.num_processes)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
