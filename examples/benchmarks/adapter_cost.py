"""Seconds and memory of adjusting a LoRA adapter of a 7B-shaped model, files to files, on random moments.

    python examples/benchmarks/adapter_cost.py --layers 32 --rule SafeDelta --threads 2

The moments of one layer are written once and stand for those of all layers, so the disk holds one layer's; each is
still read and factored for every layer.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

import safedelta_hf
from safedelta_hf import SafetyProfile, adjust_adapter_files
from safedelta_hf.core.low_rank import LowRank, Matrix, pays
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.profile.moments import Moments
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import Role, Use

MOMENTS = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "mlp",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "down",
}


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """[out, in] of each layer."""
    hidden, inner = options.hidden, options.inner
    square = dict.fromkeys(list(MOMENTS)[:4], (hidden, hidden))
    return square | {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def main() -> None:
    """Make an adapter and a profile, and adjust."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--rule", default="SafeDelta")
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=20000, help="Inputs that each moment is the sum of.")
    parser.add_argument("--storage", default="triangular")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rule = getattr(safedelta_hf, options.rule)(strength=options.strength)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_adapter(Path(folder) / "adapter", options)
        profile = repeated_profile(Path(folder) / "profile", options)
        before = peak()
        started, processed = time.perf_counter(), time.process_time()
        report = adjust_adapter_files(
            Path(folder) / "adapter", profile=profile, output=Path(folder) / "adjusted", rule=rule
        )
        seconds, busy = time.perf_counter() - started, time.process_time() - processed
    print(report.summary())
    print(
        f"{options.rule}({options.strength}), rank {options.rank}, {options.layers} layers, {options.threads} threads: "
        f"{seconds:.1f} s ({busy:.1f} s of CPU time), peak {peak():.2f} GB (before: {before:.2f} GB)"
    )


def peak() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def write_adapter(folder: Path, options: argparse.Namespace) -> None:
    """A random LoRA on every linear layer."""
    rank = options.rank
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(options.layers):
        for name, (rows, columns) in shapes(options).items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.split(".")[1] for name in MOMENTS]
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))


def repeated_profile(folder: Path, options: argparse.Namespace) -> SafetyProfile:
    """A profile whose moments are those of one layer on disk, read again for each of the others."""
    hidden, inner = options.hidden, options.inner
    layer = {"attention": hidden, "output": hidden, "mlp": hidden, "down": inner}
    parameters = {
        f"model.layers.{number}.{name}.weight": (f"{number}.{moment}", shapes(options)[name])
        for number in range(options.layers)
        for name, moment in MOMENTS.items()
    }
    header = ProfileHeader(
        architecture="LlamaForCausalLM",
        base=dict.fromkeys(parameters, ""),
        dtypes=dict.fromkeys(parameters, "bfloat16"),
        tokenizer=None,
        data="",
        sequences=128,
        tokens=20000,
        skipped={},
    )
    uses = tuple(
        Use(parameter=name, role=Role.LINEAR, moment=key, view=Role.LINEAR.view(shape), shape=shape)
        for name, (key, shape) in parameters.items()
    )
    moments = Moments({name: random_moment(columns, options.tokens) for name, columns in layer.items()})
    SafetyProfile(header=header, uses=(), moments=moments).save(folder, options.storage)
    del moments
    return SafetyProfile(header=header, uses=uses, moments=Repeated(SafetyProfile.load(folder).moments, options.layers))


class Repeated(Moments):
    """The moments of one layer under the keys of many."""

    def __init__(self, moments: Moments, layers: int) -> None:
        super().__init__({f"{number}.{key}": None for number in range(layers) for key in moments})
        self._moments = moments

    def __getitem__(self, key: str) -> InputMoment:
        return self._moments[key.partition(".")[2]]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a moment."""
        return self._moments.shape(key.partition(".")[2])

    def rank(self, key: str) -> int | None:
        """Rows of its factor."""
        return self._moments.rank(key.partition(".")[2])


def random_moment(columns: int, tokens: int) -> InputMoment:
    """Inputs whose features have very different sizes, as activations do; kept as they are while that pays."""
    generator = torch.Generator().manual_seed(columns)
    scales = torch.logspace(0, -2, columns)[torch.randperm(columns, generator=generator)]
    parts = (torch.randn(min(2000, tokens - start), columns, generator=generator) for start in range(0, tokens, 2000))
    total: Matrix
    if pays(tokens, columns):
        total = LowRank(factor=torch.cat([part * scales for part in parts]))
    else:
        total = torch.zeros(columns, columns)
        for part in parts:
            total.addmm_((part * scales).T, part * scales)
    return InputMoment(total=total, sequences=128, tokens=tokens)


if __name__ == "__main__":
    main()
