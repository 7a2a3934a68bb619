"""Fine-tunings with a defence in each step; run under torchrun.

python -m tests.programs.defending BACKEND FOLDER
"""

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from transformers import DataCollatorForSeq2Seq, Trainer

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.training import ProjectedTraining, SafetyProbeConfig, with_safety_probe
from tests.fixtures import tiny
from tests.programs import shim
from tests.programs.leaving import leave_together
from tests.programs.training import BACKENDS, MODELS, adapted, made_whole, whole_weights
from tests.training.test_preferences import PLAIN

PROBED = {
    "probed": {"probe": {}},
    "probed_lora": {"probe": {}, "lora": True},
    "probed_literally": {"probe": {"normalise": "none", "beta": 30.0, "loss": "difference"}},
}
PROJECTED = {
    "projected": {"projected": {"strength": 0.1}},
    "projected_conv1d": {"projected": {"strength": 0.1}, "name": "gpt2"},
    "projected_lora": {"projected": {"strength": 0.1}, "lora": True},
    "null_space": {"projected": {"hard": 0.05}},
    "null_space_lora": {"projected": {"hard": 0.05}, "lora": True},
}
CASES = PROBED | PROJECTED


def trainer(backend, folder, world, *, name="llama", lora=False, probe=None, projected=None):
    settings = dict(BACKENDS[backend])
    if "fsdp_config" in settings:
        layer = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block"}[name]
        settings["fsdp_config"] = settings["fsdp_config"] | {"transformer_layer_cls_to_wrap": layer}
    training = {
        "optim": "sgd",
        "learning_rate": 0.3,
        "per_device_train_batch_size": 4 // world,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
    }
    model = made_whole(MODELS[name])
    kind, more = Trainer, {}
    if probe is not None:
        # Steps of the size of rounding differ: so the move is a large one; an odd number of pairs is shared out.
        config = SafetyProbeConfig(**{"pairs": PLAIN, "batch_size": 3, "epsilon": 1e-2} | probe)
        kind, more = with_safety_probe(Trainer), {"probe": config}
    return kind(
        model=adapted(model) if lora else model,
        args=tiny.arguments(folder, **training | settings),
        train_dataset=tiny.rows(32, seed=2),  # of unequal lengths, so that ranks count different tokens
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        processing_class=tiny.tokenizer(),
        callbacks=[] if projected is None else [ProjectedTraining(tiny.rows(23, seed=1), **projected)],
        **more,
    )


def train(backend, folder, case, world):
    run = trainer(backend, folder / "run", world, **CASES[case])
    run.train()
    found = whole_weights(run.model)
    if run.is_world_process_zero():
        save_file(found, folder / f"{case}.safetensors")


def refused(backend, folder, case, world):
    try:
        trainer(backend, folder / "run", world, **CASES[case]).train()
    except ConfigurationError as error:
        assert "train in one process" in str(error), error
        print(f"{case} refused")


WORKING = {"ddp": CASES, "fsdp2": PROJECTED, "zero3": {}, "fsdp1": {}}


def refusing(backend):
    return [case for case in ("probed", "projected") if case not in WORKING[backend]]


def main(backend, folder):
    if backend.startswith("zero"):
        shim.deepspeed_on_cpu()
    if not BACKENDS[backend]["use_cpu"]:
        shim.install()
    state = PartialState(cpu=BACKENDS[backend]["use_cpu"])
    for case in WORKING[backend]:
        train(backend, Path(folder), case, state.num_processes)
    for case in refusing(backend):
        refused(backend, Path(folder), case, state.num_processes)
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
