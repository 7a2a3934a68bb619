"""DeepSpeed's ZeRO on two processes against one."""

import sys

import torch
import torch.distributed as dist

from tests.programs import shim

shim.deepspeed_on_cpu()

import deepspeed  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402

from tests.programs.tower import RATE, Checks, Tower, loss_of  # noqa: E402


def engine_of(model, stage: int, **settings):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage} | settings.pop("zero", {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
    } | settings
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def stepping(engine):
    def step(tokens) -> None:
        engine.backward(loss_of(engine(tokens)))
        engine.step()

    return step


def masters_agree(checks: Checks, name: str) -> None:
    for key in checks.opened.all_names:
        master = safe_get_full_fp32_param(checks.opened.live(key))
        assert torch.equal(master.to(checks.opened.dtype(key)), checks.opened.read(key)), key
    checks.report(name)


def half_precision(stage: int, kind: str) -> None:
    """The optimizer's master copy agrees with what the 16 bits of the parameter hold of it."""
    model, twin = Tower().bfloat16(), Tower().bfloat16()
    engine = engine_of(model, stage, bf16={"enabled": True})
    checks = Checks(kind, f"{stage}-bfloat16", model, twin, stepping(engine), tolerance=0.05)
    checks.read("read")
    checks.write(1)
    checks.read("read_after_write")
    masters_agree(checks, "master")
    checks.agree("forward")
    checks.train()
    checks.read("the_next_step_starts_from_what_was_written", exact=False)


def frozen(stage: int, kind: str) -> None:
    """A frozen parameter has no master copy."""
    model, twin = Tower(), Tower()
    for each in (model, twin):
        each.blocks.requires_grad_(False)
    engine = engine_of(model, stage)
    checks = Checks(kind, f"{stage}-frozen", model, twin, stepping(engine))
    checks.write(1)
    checks.agree("write")
    checks.train()
    checks.read("training", exact=False)


def main(*stages: str) -> None:
    dist.init_process_group("gloo")
    for stage in map(int, stages):
        kind = "ZeRO-3" if stage == 3 else "ZeRO-1/2"
        layouts = {"plain": {}, "optimizer_offloaded": {"offload_optimizer": {"device": "cpu"}}}
        if stage == 3:
            # Parameters below this size stay gathered between forward passes; by default, all of this model are.
            layouts["always_freed"] = {"stage3_param_persistence_threshold": 0}
            layouts["offloaded"] = {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}
        for name, zero in layouts.items():
            model, twin = Tower(), Tower()
            engine = engine_of(model, stage, zero=zero)
            state = engine._zero3_consolidated_16bit_state_dict if stage == 3 else model.state_dict
            checks = Checks(kind, f"{stage}-{name}", model, twin, stepping(engine), state)
            checks.all()
            masters_agree(checks, "master")
        half_precision(stage, kind)
        frozen(stage, kind)
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
