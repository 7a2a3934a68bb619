"""What the callback costs: its time and peak memory beside those of the fine-tuning itself.

    python examples/benchmarks/cost.py [--hidden 512] [--layers 8] [--steps 60] [--repeats 3]

A Llama of random weights is fine-tuned on random tokens, in child processes, with and without the callback in turn.
Ratios are taken within each pair; medians are printed.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from safedelta_hf import SafeDelta, SafeDeltaCallback


class TimedCallback(SafeDeltaCallback):
    """Measures its two moments of work."""

    seconds: dict

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Time the capture."""
        started = time.perf_counter()
        super().on_train_begin(*args, **kwargs)
        self.seconds = {"capture": time.perf_counter() - started}

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        """Time the adjustment."""
        started = time.perf_counter()
        super().on_train_end(*args, **kwargs)
        self.seconds["adjustment"] = time.perf_counter() - started


def rows(count: int, length: int) -> list[dict]:
    """Random token sequences."""
    return [{"input_ids": row, "labels": row} for row in torch.randint(0, 4096, (count, length)).tolist()]


def run(options: argparse.Namespace) -> dict[str, float]:
    """Fine-tune once in this process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    callbacks = [TimedCallback(rows(options.safety, 64), SafeDelta())] if options.child == "callback" else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=LlamaForCausalLM(config),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=rows(8 * options.steps, 64),
            callbacks=callbacks,
        )
        started = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - started
    seconds = callbacks[0].seconds if callbacks else {"capture": 0.0, "adjustment": 0.0}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    training = total - sum(seconds.values())
    return {"training": training, **seconds, "peak_mib": peak, "parameters": parameters}


def child(options: argparse.Namespace, kind: str) -> dict[str, float]:
    """Fine-tune once in a process of its own."""
    passed = [f"--{name}={getattr(options, name)}" for name in ("hidden", "layers", "steps", "safety")]
    command = [sys.executable, __file__, f"--child={kind}", *passed]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Alternate runs with and without the callback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--safety", type=int, default=128, help="safety sequences of 64 tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=["plain", "callback"])
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options)))
        return
    pairs = [(child(options, "plain"), child(options, "callback")) for _ in range(options.repeats)]
    print(
        f"{pairs[0][0]['parameters'] / 1e6:.1f} M parameters, {options.steps} steps, {options.safety} safety sequences"
    )
    for part in ("capture", "adjustment"):
        shares = [with_it[part] / with_it["training"] for _, with_it in pairs]
        print(f"{part}: {statistics.median(shares):.1%} of the training time ({min(shares):.1%} to {max(shares):.1%})")
    ratios = [with_it["peak_mib"] / plain["peak_mib"] for plain, with_it in pairs]
    print(f"peak memory: {statistics.median(ratios):.3f} times that of training alone")


if __name__ == "__main__":
    main()
