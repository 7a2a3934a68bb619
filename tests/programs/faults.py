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

from safedelta_hf.errors import RestoreError, SafeDeltaError
from tests.programs import training
from tests.programs.leaving import leave_together

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


def uncaught(backend, folder, name, world):
    """Train as a script does that catches nothing."""
    _, trainer = training.trainer(backend, folder, world=world)
    with raising(UNCAUGHT[name], OSError(f"broken on purpose: {name}"), call=2):
        trainer.train()


FAULTS = {
    # What raises, on which rank of FSDP2 and of DDP, at which call; the case of the training; and what it leaves.
    "data": (("safedelta_hf.capture.collect.read_safety_data", 1, 1, 1), "full", "begin"),
    "reading": (("safedelta_hf.distributed.zero.PartitionedModel.read", 1, 1, 3), "full", "begin"),
    "task_data": ((PROFILES, 1, 1, 1), "task", "begin"),
    "diverged": (None, "full", "end"),
    "factorise": (("safedelta_hf.rules.ridge.Ridge.factorise", 1, 1, 2), "full", "end"),
    "prepare_lora": (("safedelta_hf.rules.safe_delta.SafeDelta.factorise", 1, 1, 2), "lora", "end"),
    "measure_lora": (("safedelta_hf.rules.ridge.Ridge.factorise", 1, 1, 2), "lora_linear", "end"),
    "journal_folder": ((f"{JOURNAL}.ScratchFolder", 1, 1, 2), "full", "end"),
    "disk_full": ((f"{JOURNAL}.save_file", 1, 0, 5), "full", "end"),
    "putting_back": ((f"{JOURNAL}.Journal._original", 1, 1, 1), "full", "mixed"),
    "rescue": (("safedelta_hf.hf.tuned._save", 0, 0, 1), "full", "end"),
}


def fault(backend, folder, name, world):
    """Train, hear of the failure on every rank, and be in step afterwards."""
    patch, case, stage = FAULTS[name]
    callback, trainer = training.trainer(backend, folder, world=world, **training.CASES[case])
    before = training.Before(diverges=name == "diverged")
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
        assert all(str(place) in said for place in rescued), said
        if rescued and dist.get_rank() == 0:
            training.require_saved(rescued[0], before.whole, case)
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
    for ended, wanted in ((training.own_part(model), before.own), (training.whole_weights(model), before.whole)):
        assert ended.keys() == wanted.keys()
        assert all(torch.equal(ended[name].nan_to_num(7.0), value.nan_to_num(7.0)) for name, value in wanted.items())


def main(backend, folder, *checks):
    world = training.start(backend)
    for check in checks:
        (uncaught if check in UNCAUGHT else fault)(backend, Path(folder) / check, check, world)
        if dist.get_rank() == 0:
            print(f"passed {check}", flush=True)
        dist.barrier()
    leave_together()


if __name__ == "__main__":
    main(*sys.argv[1:])
