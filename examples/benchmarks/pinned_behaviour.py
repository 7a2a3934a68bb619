"""What the package computes, kept as files, to show that a change of its code changes no result.

    python examples/benchmarks/pinned_behaviour.py run --output before
    python examples/benchmarks/pinned_behaviour.py run --output after --tuned before
    python examples/benchmarks/pinned_behaviour.py compare before after

`run` fine-tunes the testbed's model on all cases, whole and with a LoRA, on one process and on two, with the callback;
adjusts the fine-tuned models again with several rules, in memory and files to files; and applies every rule to tiny
models of other architectures. It keeps each result as `runs/NAME.safetensors` with `runs/NAME.json`, and the fine-tuned
models in `tuned`. With `--tuned` the models of another run are adjusted, whatever became of training.

`compare` names for each result the largest relative difference of a parameter, `max |a - b| / max |a|`, and that of the
strength; it exits with 1 if one is above 1e-6, or if parameters, outcomes or results differ.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    set_seed,
)

from safedelta_hf import (
    Dare,
    ModelStock,
    Report,
    Ridge,
    SafeDelta,
    SafeDeltaCallback,
    SafeMerge,
    SafetyProfile,
    Scale,
    Slerp,
    TaskRidge,
    Ties,
    Treatment,
    adjust_adapter,
    adjust_checkpoint,
    adjust_model,
    collect_profile,
)
from safedelta_hf.testbed import ALIGNED_MODEL, CASES, Case, fine_tune, load_aligned, safety_data

TOLERANCE = 1e-6
SEED = 0
EPOCHS = {"harmful": 4, "identity": 4, "mixed": 1, "skill": 1, "benign": 1}
LORA_RATE = 5.0
"""Learning rate of a LoRA run, in units of the case's."""

RULES = {
    "safe_delta-0.1": SafeDelta(strength=0.1),
    "safe_delta-1": SafeDelta(strength=1.0),
    "ridge-1": Ridge(strength=1.0),
    "scale-1": Scale(strength=1.0),
}
VOCABULARY = 48
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
TINY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=1)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
}


class Results:
    """A folder of results by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor], report: Report | None = None) -> None:
        """Write tensors and what a report says of them."""
        whole = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
        save_file(whole, self._folder / f"{name}.safetensors")
        told = {} if report is None else summary(report)
        (self._folder / f"{name}.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        print(f"  {name}", flush=True)


def summary(report: Report) -> dict[str, Any]:
    """Strength, outcomes and figures of a report."""
    search = report.search
    return {
        "strength": report.rule.settings["strength"] if search is None else search.strength,
        "trials": []
        if search is None
        else [[trial.strength, trial.lost, trial.probability_lost] for trial in search.trials],
        "outcomes": {record.parameter: record.outcome for record in report.parameters},
        "metrics": report.metrics(),
    }


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter once, by name."""
    return dict(model.named_parameters())


def moments(profile: SafetyProfile) -> dict[str, torch.Tensor]:
    """Moments by parameter, role, and where the matrix begins in the parameter."""
    found = {}
    for use in profile.uses:
        matrix = getattr(use, "part", None) or getattr(use, "view", None)
        start = 0 if matrix is None else matrix.start
        found[f"{use.parameter} {use.role} {start}"] = profile.moments[use.moment].total
    return found


def short_case(name: str, *, lora: bool) -> Case:
    """A case with so few steps that it need not learn well."""
    case = CASES[name]
    return replace(case, epochs=EPOCHS[name], learning_rate=case.learning_rate * (LORA_RATE if lora else 1.0))


def with_lora(model: PreTrainedModel) -> PeftModel:
    """A fresh LoRA on all linear layers."""
    set_seed(SEED)
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
    )


def train(output: Path, cases: list[str]) -> None:
    """Fine-tune with the callback at its defaults on all cases, on this and other processes."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for name in cases:
        for kind in ("full", "lora"):
            model, tokenizer = load_aligned()
            model = with_lora(model) if kind == "lora" else model
            kept = output / "tuned" / f"{name}-{kind}" if world == 1 else None
            callback = SafeDeltaCallback(safety_data(64), keep_tuned=kept)
            with tempfile.TemporaryDirectory() as folder:
                case = short_case(name, lora=kind == "lora")
                fine_tune(model, tokenizer, case, seed=SEED, output=Path(folder), callbacks=[callback], progress=False)
            if rank == 0:
                Results(output / "runs").keep(f"callback-{world}-{name}-{kind}", weights(model), callback.report)
    if dist.is_initialized():
        dist.destroy_process_group()


def train_on_two(output: Path, cases: list[str]) -> None:
    """The same on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*launcher, __file__, "train", "--output", str(output), "--cases", *cases], check=True)


def adjust_again(results: Results, tuned: Path, cases: list[str]) -> None:
    """Adjust fine-tuned models of the testbed after the fact."""
    base, tokenizer = load_aligned()
    profile = collect_profile(base, safety_data(64), tokenizer, progress=False)
    results.keep("profile-testbed", moments(profile))
    with tempfile.TemporaryDirectory() as folder:
        profile.save(Path(folder) / "profile")
        for name in cases:
            for rule in RULES:
                adjust_in_memory(results, tuned, name, rule, profile, base)
            for rule in ("safe_delta-0.1", "ridge-1"):
                adjust_files(results, tuned, name, rule, Path(folder))


def adjust_in_memory(
    results: Results, tuned: Path, name: str, rule: str, profile: SafetyProfile, base: PreTrainedModel
) -> None:
    """A whole model, and an adapter."""
    settings: dict[str, Any] = {"profile": profile, "rule": RULES[rule], "progress": False}
    model = AutoModelForCausalLM.from_pretrained(tuned / f"{name}-full")
    report = adjust_model(model, base=base, **settings)
    results.keep(f"model-{name}-{rule}", weights(model), report)
    adapted = PeftModel.from_pretrained(load_aligned()[0], tuned / f"{name}-lora")
    report = adjust_adapter(adapted, **settings)
    results.keep(f"adapter-{name}-{rule}", weights(adapted), report)


def adjust_files(results: Results, tuned: Path, name: str, rule: str, folder: Path) -> None:
    """A whole model with the function, and an adapter with the command, files to files."""
    output = folder / f"{name}-{rule}"
    report = adjust_checkpoint(
        base=ALIGNED_MODEL,
        tuned=tuned / f"{name}-full",
        output=output,
        profile=folder / "profile",
        rule=RULES[rule],
        progress=False,
    )
    results.keep(f"checkpoint-{name}-{rule}", in_files(output), report)
    output = folder / f"{name}-{rule}-adapter"
    options = {
        "--adapter": tuned / f"{name}-lora",
        "--profile": folder / "profile",
        "--output": output,
        "--rule": RULES[rule].name,
        "--strength": RULES[rule].settings["strength"],
    }
    (command,) = entry_points(group="console_scripts", name="safedelta")
    command.load()(["apply", *(str(word) for option in options.items() for word in option)], standalone_mode=False)
    results.keep(f"apply-{name}-{rule}", in_files(output))


def in_files(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def shifted(base: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy with a random delta on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    """Random sequences of three lengths."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, VOCABULARY, (8 + 3 * (n % 3),), generator=generator).tolist() for n in range(count)]
    return [{"input_ids": row, "labels": row} for row in drawn]


def rules_for(base: PreTrainedModel) -> dict[str, Any]:
    """Every rule, with further models where it takes some."""
    others = [shifted(base, 11), shifted(base, 12)]
    return {
        **{f"safe_delta-{way}": SafeDelta(strength=0.5, compensation=way) for way in ("joint", "sequential", "none")},
        "safe_delta-auto": SafeDelta(strength="auto"),
        "ridge": Ridge(strength=1.0),
        "ridge-auto": Ridge(strength="auto"),
        "task_ridge": TaskRidge(strength=1.0),
        "scale": Scale(strength=1.0),
        "slerp": Slerp(strength=1.0),
        "ties": Ties(strength=4.0, others=others),
        "dare": Dare(strength=1.0),
        "dare-rescaled": Dare(strength=1.0, rescale=True),
        "model_stock": ModelStock(strength=1.0, others=others),
        "safe_merge": SafeMerge(strength=0.25, threshold=0.9, unaligned=others[0], safe=others[1]),
    }


def adjust_tiny(results: Results) -> None:
    """Every rule on tiny models of several architectures, with random deltas."""
    for name, made in TINY.items():
        torch.manual_seed(SEED)
        base = made().eval()
        profile = collect_profile(base, rows(32, seed=1), progress=False)
        task = collect_profile(base, rows(16, seed=2), progress=False)
        results.keep(f"profile-{name}", moments(profile))
        for label, rule in rules_for(base).items():
            model = shifted(base, seed=3)
            weighed = {"task": task} if rule.needs_task else {}
            treatment = Treatment(uncovered="keep")
            report = adjust_model(
                model, base=base, profile=profile, rule=rule, treatment=treatment, progress=False, **weighed
            )
            results.keep(f"tiny-{name}-{label}", weights(model), report)


def run(options: argparse.Namespace) -> int:
    """Compute and keep everything."""
    if options.output.exists():
        print(f"{options.output} exists; name a new folder", file=sys.stderr)
        return 2
    steps = {
        "tiny models": lambda: adjust_tiny(Results(options.output / "runs")),
        "callback": lambda: train(options.output, options.cases),
        "callback on two processes": lambda: train_on_two(options.output, options.cases),
        "adjusted again": lambda: adjust_again(
            Results(options.output / "runs"), (options.tuned or options.output) / "tuned", options.cases
        ),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        print(name, flush=True)
        step()
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Print what differs."""
    before, after = (
        {file.stem: file for file in sorted((folder / "runs").glob("*.safetensors"))}
        for folder in (options.before, options.after)
    )
    failed = not before
    for name in sorted(before | after):
        if name not in before or name not in after:
            print(f"{name}: only {'after' if name in after else 'before'}")
            failed = True
            continue
        remarks = list(differences(before[name], after[name]))
        failed |= any(is_too_much for _, is_too_much in remarks)
        print(f"{name}: {'; '.join(remark for remark, _ in remarks) or 'equal bit for bit'}")
    print(f"{len(before)} results before, {len(after)} after: {'they differ' if failed else 'they agree'}")
    return int(failed)


def differences(before: Path, after: Path) -> Iterator[tuple[str, bool]]:
    """What differs between two results, and whether that is too much."""
    old, new = load_file(before), load_file(after)
    if strangers := sorted(old.keys() ^ new.keys()):
        yield f"{len(strangers)} parameters in one alone, such as {strangers[0]}", True
    apart = {name: relative(old[name], new[name]) for name in old.keys() & new.keys()}
    if any(not same_bits(old[name], new[name]) for name in apart):
        worst = max(apart, key=apart.__getitem__)
        yield f"largest relative difference {apart[worst]:.2g} ({worst})", apart[worst] > TOLERANCE
    told, tells = (json.loads(file.with_suffix(".json").read_text(encoding="utf-8")) for file in (before, after))
    if told.get("outcomes") != tells.get("outcomes"):
        yield "outcomes differ", True
    if told.get("strength") != tells.get("strength"):
        strengths = torch.tensor([told["strength"], tells["strength"]], dtype=torch.float64)
        difference = relative(strengths[0], strengths[1])
        yield f"strength {told['strength']!r} before, {tells['strength']!r} after", difference > TOLERANCE
    for key in ("trials", "metrics"):
        if told.get(key) != tells.get(key):
            yield f"{key} differ", False


def same_bits(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two tensors are the same, be it NaN."""
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    return torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8))


def relative(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest difference, in units of the largest value; infinite where there is no such number."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf")
    if same_bits(before, after):
        return 0.0
    difference = (before.double() - after.double()).abs().max().item()
    largest = before.double().abs().max().item()
    ratio = difference / largest if largest else (float("inf") if difference else 0.0)
    return ratio if ratio == ratio else float("inf")


def main() -> int:
    """Run or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "train"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, required=True, help="Folder to write.")
        command.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
        command.add_argument("--tuned", type=Path, help="Folder of another run, whose fine-tuned models to adjust.")
    command = commands.add_parser("compare")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return compare(options)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    if options.command == "train":
        train(options.output, options.cases)
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
