"""Peak memory and time of adjusting a model files to files, against the number of its layers.

    python examples/benchmarks/checkpoint_memory.py --layers 4 16 64 --threads 2

Base, fine-tune and profile of each size are random and are written to disk first. Each measurement is a process of its
own; its constant part is what it takes after its imports, before it opens a file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import safedelta_hf
from safedelta_hf import SafetyProfile, adjust_checkpoint
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.profile.moments import Moments
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import Role, Use
from safedelta_hf.weights.digest import digest

READS = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "down",
}
SEQUENCES = 128


class RandomMoments(Moments):
    """Moments that are made when they are asked for: one for each width and kind, whatever the key."""

    def __init__(self, widths: dict[str, tuple[int, bool]]) -> None:
        super().__init__(widths)
        self._widths = widths

    def __getitem__(self, key: str) -> InputMoment:
        width, is_diagonal = self._widths[key]
        rows = torch.randn(width + 64, width, generator=torch.Generator().manual_seed(width))
        total = rows.square().sum(0) if is_diagonal else rows.T @ rows
        return InputMoment(total=total, sequences=SEQUENCES, tokens=len(rows))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment."""
        width, is_diagonal = self._widths[key]
        return (width,) if is_diagonal else (width, width)


def parameters(options: argparse.Namespace, layers: int) -> dict[str, tuple[tuple[int, ...], Role, str, int]]:
    """Shape, role, moment and its width of each parameter, in the order of the forward pass."""
    hidden, inner, words = options.hidden, options.inner, options.vocabulary
    found: dict[str, tuple[tuple[int, ...], Role, str, int]] = {
        "model.embed_tokens.weight": ((words, hidden), Role.EMBEDDING, "tokens", words)
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = ((hidden,), Role.SCALE, f"{prefix}.{norm}", hidden)
        for name, moment in READS.items():
            columns = inner if name == "mlp.down_proj" else hidden
            rows = inner if name in ("mlp.gate_proj", "mlp.up_proj") else hidden
            found[f"{prefix}.{name}.weight"] = ((rows, columns), Role.LINEAR, f"{prefix}.{moment}", columns)
    found["model.norm.weight"] = ((hidden,), Role.SCALE, "norm", hidden)
    found["lm_head.weight"] = ((words, hidden), Role.HEAD, "head", hidden)
    return found


def write_inputs(folder: Path, options: argparse.Namespace, layers: int) -> int:
    """Write base, fine-tune and profile; returns the number of weights."""
    told = parameters(options, layers)
    digests: dict[str, str] = {}
    for place, per_file, spread in (("base", 31, 0.0), ("tuned", 40, 0.01)):
        names, weight_map = list(told), {}
        (folder / place).mkdir()
        for start in range(0, len(names), per_file):
            file = f"model-{start:05d}.safetensors"
            tensors = {}
            for number, name in enumerate(names[start : start + per_file], start):
                generator = torch.Generator().manual_seed(number)
                weight = (torch.randn(told[name][0], generator=generator) * 0.02).bfloat16()
                digests.setdefault(name, digest(weight))
                tensors[name] = weight + (torch.randn(told[name][0], generator=generator) * spread).bfloat16()
                weight_map[name] = file
            save_file(tensors, folder / place / file, metadata={"format": "pt"})
        (folder / place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / place / "config.json").write_text("{}")
    moments = {moment: (width, role in (Role.EMBEDDING, Role.SCALE)) for _, role, moment, width in told.values()}
    profile = SafetyProfile(
        header=ProfileHeader(
            architecture="LlamaForCausalLM",
            base=digests,
            dtypes=dict.fromkeys(told, "bfloat16"),
            tokenizer=None,
            data="",
            sequences=SEQUENCES,
            tokens=SEQUENCES * 16,
            skipped={},
        ),
        uses=tuple(
            Use(parameter=name, role=role, moment=moment, view=role.view(shape), shape=shape)
            for name, (shape, role, moment, _) in told.items()
        ),
        moments=RandomMoments(moments),
    )
    profile.save(folder / "profile")
    return sum(torch.Size(shape).numel() for shape, *_ in told.values())


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Adjust, and print what it took."""
    torch.set_num_threads(options.threads)
    rule = getattr(safedelta_hf, options.rule)(strength=options.strength)
    before, started, processed = peak(), time.perf_counter(), time.process_time()
    report = adjust_checkpoint(
        base=folder / "base",
        tuned=folder / "tuned",
        profile=folder / "profile",
        output=folder / "output",
        rule=rule,
        progress=False,
    )
    seconds, busy = time.perf_counter() - started, time.process_time() - processed
    values = {"constant": before, "peak": peak(), "seconds": seconds, "busy": busy}
    assert report.outcomes["adjusted"] == len(report.parameters), report.outcomes
    print(json.dumps(values))


def peak() -> float:
    """Largest resident memory of this process so far, in MB; that of getrusage may be its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(folder: Path) -> dict[str, float]:
    """What a process of its own takes for one run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--run", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    subprocess.run(["rm", "-r", str(folder / "output")], check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Make each size, measure it several times, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rule", default="SafeDelta")
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--run", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        measure(options.run, options)
        return
    print("layers | weights (M) | constant (MB) | peak (MB) | peak - constant (MB) | s | CPU s | CPU ns per weight")
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            count = write_inputs(Path(folder), options, layers)
            runs = [measured(Path(folder)) for _ in range(options.repeats)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        above = statistics.median(run["peak"] - run["constant"] for run in runs)
        figures = (median["constant"], median["peak"], above, median["seconds"], median["busy"])
        values = (layers, count / 1e6, *figures, median["busy"] / count * 1e9)
        print(" | ".join(f"{value:.0f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
