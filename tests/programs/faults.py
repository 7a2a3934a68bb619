"""What goes wrong on one rank of a training is heard by all of them; run under torchrun.

python -m tests.programs.faults BACKEND FOLDER CHECK ...
"""

import pkgutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from safedelta_hf.errors import RestoreError, SafeDeltaError
from tests.fixtures import tiny
from tests.programs import shim, training

PROFILES = "safedelta_hf.hf.profiles.examples_of"
JOURNAL = "safedelta_hf.weights.journal"


@contextmanager
def raising(place, error, *, rank=1, call=1):
    """Let a function raise at its n-th call and ever after, on one rank."""
    original, calls = pkgutil.resolve_name(place), []

    def wrapped(*args, **kwargs):
        calls.append(place)
        if len(calls) >= call and dist.get_rank() == rank:
            print(f"fails at {time.time()}", flush=True)
            raise error
        return original(*args, **kwargs)

    with mock.patch(place, wrapped):
        yield


UNCAUGHT = {
    "adjusting": "safedelta_hf.rules.ridge.Ridge.factorise",
    "forward": "safedelta_hf.capture.collector.MomentCollector.product",
}


def uncaught(backend, folder, name):
    """Train as a script does that catches nothing."""
    _, trainer = training.trainer(backend, folder, world=2)
    with raising(UNCAUGHT[name], OSError(f"broken on purpose: {name}"), call=2):
        trainer.train()


def own_part(model):
    """What this rank holds."""
    parts = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: (part.to_local() if hasattr(part, "to_local") else part).clone() for name, part in parts.items()}


class Before(TrainerCallback):
    """Remembers what training ends with, and lets it diverge on one rank."""

    def __init__(self, *, diverges=False):
        self.diverges, self.own, self.whole = diverges, None, None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        if self.diverges and dist.get_rank() == 1:
            part = model.get_parameter("model.layers.1.mlp.down_proj.weight").detach()
            (part.to_local() if hasattr(part, "to_local") else part)[-1, -1] = float("nan")
        self.own, self.whole = own_part(model), training.whole_weights(model)


FAULTS = {
    # What raises, on which rank of FSDP2 and of DDP, at which call; the case of the training; and what it leaves.
    "data": (("safedelta_hf.capture.collect.read_safety_data", 1, 1, 1), "full", "begin"),
    "task_data": ((PROFILES, 1, 1, 1), "task", "begin"),
    "diverged": (None, "full", "end"),
    "prepare": (("safedelta_hf.rules.ridge.Ridge.factorise", 1, 1, 2), "full", "end"),
    "prepare_lora": (("safedelta_hf.rules.safe_delta.SafeDelta.factorise", 1, 1, 2), "lora", "end"),
    "journal_folder": ((f"{JOURNAL}.ScratchFolder", 1, 1, 2), "full", "end"),
    "disk_full": ((f"{JOURNAL}.save_file", 1, 0, 5), "full", "end"),
    "putting_back": ((f"{JOURNAL}.Journal._original", 1, 1, 1), "full", "mixed"),
    "rescue": (("safedelta_hf.hf.tuned._save", 0, 0, 1), "full", "end"),
}


def fault(backend, folder, name):
    """Train, hear of the failure on every rank, and be in step afterwards."""
    patch, case, stage = FAULTS[name]
    callback, trainer = training.trainer(backend, folder, world=2, **training.CASES[case])
    before = Before(diverges=name == "diverged")
    trainer.callback_handler.callbacks.insert(0, before)
    failing, text = 1, "holds NaN or Inf"
    patches = []
    if patch is not None:
        place, *ranks, call = patch
        failing, text = ranks[backend == "ddp"], f"broken on purpose: {name}"
        patches.append(raising(place, OSError(text), rank=failing, call=call))
    if name in ("putting_back", "rescue"):
        patches.append(raising("safedelta_hf.rules.ridge.Ridge.factorise", OSError("first"), call=3))
    error = failed(trainer, patches)
    said = "\n".join(map(str, [error, error.__cause__, *getattr(error, "__notes__", ())]))
    assert text in said, said
    assert dist.get_rank() == failing or f"rank {failing} failed" in said, said
    if stage == "end":
        require_untouched(trainer.model, before)
        rescued = list(folder.glob("tuned-not-adjusted-*"))
        assert len(rescued) == (name != "rescue"), rescued
        if rescued and dist.get_rank() == 0:
            require_saved(rescued[0], before.whole, case)
    if stage == "mixed":
        assert isinstance(error, RestoreError)
        assert "neither the weights from before" in said
        assert not list(folder.glob("tuned-not-adjusted-*")), "what is neither tuned nor adjusted is not called tuned"
    left = [path.name for path in folder.glob("_safedelta-*")]
    assert bool(left) == (stage == "mixed"), left


def failed(trainer, patches):
    try:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            trainer.train()
    except SafeDeltaError as error:
        dist.barrier()
        return error
    raise AssertionError("nothing was raised")


def require_untouched(model, before):
    own = own_part(model)
    assert own.keys() == before.own.keys()
    assert all(torch.equal(own[name].nan_to_num(7.0), value.nan_to_num(7.0)) for name, value in before.own.items())


def require_saved(folder, expected, case):
    """What was saved loads, and is what training ended with."""
    if training.CASES[case].get("lora"):
        loaded = PeftModel.from_pretrained(training.without_dropout(tiny.llama()), folder)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    weights = tiny.weights(loaded)
    assert weights.keys() == expected.keys(), weights.keys() ^ expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


def main(backend, folder, *checks):
    if backend != "ddp":
        shim.install()
    from accelerate import PartialState

    PartialState(cpu=backend == "ddp")
    for check in checks:
        (uncaught if check in UNCAUGHT else fault)(backend, Path(folder) / check, check)
        if dist.get_rank() == 0:
            print(f"passed {check}", flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
