"""Time of collecting a profile and of adjusting on several processes, as a share of that on one.

    python examples/benchmarks/ranks.py --processes 2 --hidden 768 --layers 4

Runs the same work on one process and on several, taking turns, and prints the medians of the ratios. Each process
computes with one thread.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import safedelta_hf
from safedelta_hf import ProfileConfig, adjust_model, collect_profile


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rule", default="SafeDelta")
    parser.add_argument("--strength", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sharded", action="store_true", help="Shard the model with FSDP2 instead of copying it.")
    parser.add_argument("--work", type=Path, default=None, help="Do the work once and write seconds to this file.")
    return parser.parse_args()


def models(chosen: argparse.Namespace) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A base and what a fine-tuning could have made of it."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=chosen.hidden,
            intermediate_size=chosen.hidden * 5 // 2,
            num_hidden_layers=chosen.layers,
            num_attention_heads=8,
        )
    )
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return base, tuned


def work(chosen: argparse.Namespace) -> None:
    """Collect and adjust once, and write how long each took."""
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    base, tuned = models(chosen)
    if chosen.sharded and dist.is_initialized():
        for model in (base, tuned):
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
    rows = torch.randint(0, 512, (chosen.sequences, 128)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    rule = getattr(safedelta_hf, chosen.rule)(strength=chosen.strength)
    times = [time.perf_counter()]
    profile = collect_profile(base, data, config=ProfileConfig(holdout=0.0), progress=False)
    times.append(time.perf_counter())
    adjust_model(tuned, base=base, profile=profile, rule=rule, progress=False)
    times.append(time.perf_counter())
    if not dist.is_initialized() or dist.get_rank() == 0:
        chosen.work.write_text(json.dumps({"collect": times[1] - times[0], "adjust": times[2] - times[1]}))
    if dist.is_initialized():
        dist.destroy_process_group()


def measured(processes: int, file: Path) -> dict[str, float]:
    """Seconds on so many processes."""
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--work", str(file)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    seconds: dict[str, float] = json.loads(file.read_text())
    return seconds


def main() -> None:
    """Take turns, and print."""
    chosen = options()
    if chosen.work is not None:
        work(chosen)
        return
    ratios: dict[str, list[float]] = {"collect": [], "adjust": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(chosen.repeats):
            one, several = (measured(count, Path(folder) / "seconds.json") for count in (1, chosen.processes))
            for stage in ratios:
                ratios[stage].append(several[stage] / one[stage])
    for stage, found in ratios.items():
        print(
            f"{stage}: {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) of the time on one process"
        )


if __name__ == "__main__":
    main()
