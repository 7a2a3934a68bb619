"""What the package takes on an accelerator, with a model of a 7B Llama's shapes, and what runs there at all.

    python examples/benchmarks/gpu.py [--device cuda] [--layers 32] [--hidden 4096] [--only large callback ...]

A Llama of random weights in bfloat16 reads random safety data, is moved by a random delta and repaired: as a whole, and
as a LoRA of rank 16 on all linear layers; seconds and peak memory of each. The published code's loop is timed on one
layer and scaled up to all. Then a small model shows what runs: collectives of one process (NCCL), TF32 on and off, a
compiled model, weights of 4 bits, and the callback in a Trainer. Each part prints one JSON line; where one fails, the
line says so and the next part runs.

With `--device cpu` and small sizes it shows that the script itself runs.
"""

import argparse
import copy
import json
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from speed import published
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from safedelta_hf import (
    ProfileConfig,
    Ridge,
    SafeDelta,
    SafeDeltaCallback,
    SafetyProfile,
    adjust_adapter,
    adjust_model,
    collect_profile,
)

VOCABULARY = 32_000
SMALL = {"hidden": 64, "layers": 2}


def llama(hidden: int, layers: int, options: argparse.Namespace) -> PreTrainedModel:
    """A Llama of random weights, on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY if hidden > 256 else 512,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 128, 2),
    )
    with torch.device(options.device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def rows(model: PreTrainedModel, count: int, length: int) -> list[dict[str, list[int]]]:
    """Random tokens."""
    drawn = torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in drawn.tolist()]


@torch.no_grad()
def move(model: PreTrainedModel, names: str = "") -> None:
    """Add a random delta to the parameters whose names have this in them."""
    for name, parameter in model.named_parameters():
        if names in name:
            parameter.add_(torch.randn_like(parameter) * 0.02)


def accelerator(options: argparse.Namespace) -> Any:  # noqa: ANN401
    """The module of torch that knows the device, or None on a processor."""
    return None if options.device == "cpu" else torch.get_device_module(options.device)


@contextmanager
def measured(options: argparse.Namespace, found: dict[str, Any], name: str) -> Iterator[None]:
    """Seconds and peak memory of what is done inside."""
    device = accelerator(options)
    if device is not None:
        device.synchronize()
        device.reset_peak_memory_stats()
    started = time.perf_counter()
    yield
    if device is not None:
        device.synchronize()
        found[f"{name}_device_gib"] = round(device.max_memory_allocated() / 2**30, 2)
    found[f"{name}_seconds"] = round(time.perf_counter() - started, 2)
    found[f"{name}_host_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def read(model: PreTrainedModel, data: list[dict[str, list[int]]]) -> SafetyProfile:
    """A profile of some data."""
    return collect_profile(model, data, config=ProfileConfig(holdout=0.0, batch_size=8), progress=False)


def large(options: argparse.Namespace) -> dict[str, Any]:
    """Profile, repair of all weights, repair of a LoRA, and the published loop on one layer."""
    found: dict[str, Any] = {}
    base = llama(options.hidden, options.layers, options)
    found["parameters"] = sum(parameter.numel() for parameter in base.parameters())
    data = rows(base, options.sequences, options.length)
    with measured(options, found, "profile"):
        profile = read(base, data)
    tuned = copy.deepcopy(base)
    move(tuned)
    for rule in (Ridge(strength=1.0), SafeDelta(strength=0.1)):
        model = copy.deepcopy(tuned)
        with measured(options, found, f"repair_{rule.name}"):
            adjust_model(model, base=base, profile=profile, rule=rule, progress=False)
        del model
    del tuned
    adapted = with_lora(base)
    with measured(options, found, "lora"):
        adjust_adapter(adapted, profile=profile, rule=SafeDelta(strength=0.1), progress=False)
    size = options.hidden
    inputs = torch.randn(2 * size, size, device=options.device)
    weight = torch.randn(size, size, device=options.device)
    with measured(options, found, "published_layer"):
        published(inputs.T @ inputs / 64, weight, weight + 0.01 * torch.randn_like(weight))
    found["published_scaled_seconds"] = round(found["published_layer_seconds"] * (found["parameters"] / size**2), 1)
    return found


def with_lora(model: PreTrainedModel) -> PeftModel:
    """A LoRA of rank 16 on all linear layers that is not zero."""
    config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config)


def repaired(model: PreTrainedModel, profile: SafetyProfile, base: PreTrainedModel) -> dict[str, Any]:
    """A repair of a small model, and whether it changed what it should."""
    report = adjust_model(model, base=base, profile=profile, rule=Ridge(strength=1.0), progress=False)
    metrics = report.metrics()
    return {
        "adjusted": report.outcomes["adjusted"],
        "loss_share": metrics["safedelta/quadratic_loss_share"],
        "kept_share": metrics["safedelta/kept_share"],
    }


def small(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, list[dict[str, list[int]]]]:
    """A small base, what it was tuned to, and data."""
    base = llama(SMALL["hidden"], SMALL["layers"], options)
    tuned = copy.deepcopy(base)
    move(tuned)
    return base, tuned, rows(base, 8, 16)


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Collectives of one process: NCCL on an accelerator."""
    backend = "gloo" if options.device == "cpu" else "nccl"
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group(backend)
    try:
        base, tuned, data = small(options)
        return {"backend": backend, **repaired(tuned, read(base, data), base)}
    finally:
        dist.destroy_process_group()


def precisions(options: argparse.Namespace) -> dict[str, Any]:
    """Results with TF32 products allowed and not, of weights in float32; they should differ by rounding."""
    before = torch.get_float32_matmul_precision()
    base, tuned, data = (part.float() if isinstance(part, PreTrainedModel) else part for part in small(options))
    found = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = repaired(copy.deepcopy(tuned), read(base, data), base)
    finally:
        torch.set_float32_matmul_precision(before)
    return found


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    """A profile of a compiled model beside that of the model itself."""
    base, _, data = small(options)
    plain, fast = read(base, data), read(torch.compile(base), data)
    apart = [
        float((plain.moments[key].total - fast.moments[key].total).norm() / plain.moments[key].total.norm())
        for key in plain.moments
    ]
    return {"moments": len(plain.moments), "same_keys": list(plain.moments) == list(fast.moments), "apart": max(apart)}


def packed(options: argparse.Namespace) -> dict[str, Any]:
    """A LoRA on a base of 4 bits (bitsandbytes)."""
    base, _, data = small(options)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map=options.device)
    profile = read(model, data)
    report = adjust_adapter(with_lora(model), profile=profile, rule=SafeDelta(strength=0.1), progress=False)
    return {"adjusted": report.outcomes["adjusted"], "moments": len(profile.moments)}


def callback(options: argparse.Namespace) -> dict[str, Any]:
    """A Trainer with the callback, from its first step to its report."""
    base, _, data = small(options)
    added = SafeDeltaCallback(rows(base, 16, 16), Ridge(strength=1.0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=True,
            use_cpu=options.device == "cpu",
        )
        Trainer(model=base, args=arguments, train_dataset=data, callbacks=[added]).train()
    report = added.report
    assert report is not None
    return {"outcomes": dict(report.outcomes)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "large": large,
    "processes": processes,
    "precisions": precisions,
    "compiled": compiled,
    "packed": packed,
    "callback": callback,
}


def main() -> None:
    """Run the parts, each to its end or its error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.only:
        try:
            found = PARTS[name](options)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2000:]}
        print(json.dumps({"part": name, **found}), flush=True)


if __name__ == "__main__":
    main()
