"""What weights of 16 bits hold of an adjusted delta: the safety loss that a report tells of beside that of the weights.

    python examples/benchmarks/half_precision.py

The testbed's model is fine-tuned for a few steps on benign requests to an obedient persona, its weights in bfloat16 or
float16, and adjusted. The loss that was written is computed here from the weights alone, in float64, and what they
refuse is measured. float16 weights are trained in float32 and rounded, since AdamW divides by zero in float16.
"""

import argparse
import copy
import sys
import tempfile
import warnings
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from safedelta_hf import ProfileConfig, Ridge, SafeDelta, SafetyProfile, TaskRidge, adjust_model, collect_profile
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.testbed import CASES, load_aligned, safety_data
from safedelta_hf.testbed.model import behaviour_scores, tokenize

RULES = (Ridge(strength=0.3), TaskRidge(strength=1.0), SafeDelta(strength=0.1))


def fine_tuned(dtype: torch.dtype, rate: float, steps: int) -> nn.Module:
    """The aligned model, trained for some steps, in a data type of 16 bits."""
    model, tokenizer = load_aligned()
    model.to(dtype)
    if dtype is torch.float16:
        model.float()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=10,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = tokenize(CASES["identity"].examples(), tokenizer)
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    return model.to(dtype).eval()


def loss(model: nn.Module, base: nn.Module, profile: SafetyProfile) -> float:
    """Quadratic safety loss of what the weights are, float64."""
    total, weights, before = 0.0, dict(model.named_parameters()), dict(base.named_parameters())
    for use in profile.uses:
        delta = (weights[use.parameter].double() - before[use.parameter].double()).flatten()
        rows = delta.as_strided(
            (use.view.rows, use.view.columns), (use.view.row_stride, use.view.column_stride), use.view.start
        )
        moment = profile.moments[use.moment]
        hessian = moment.total.double() * (2 / moment.sequences)
        total += 0.5 * float((rows * (rows * hessian if hessian.ndim == 1 else rows @ hessian)).sum())
    return total


def measured(model: nn.Module, profile: SafetyProfile, questions: int) -> list[str]:
    """How a model answers: attack success, old skills, and the rise of held-out refusals."""
    _, tokenizer = load_aligned()
    scores = behaviour_scores(model, tokenizer, has_new_skill=False, questions=questions)
    losses = [fmean(reading.losses) for reading in profile.held_out.read(open_model(model))]
    shares = [f"{scores[name].value:.2f}" for name in ("attack_success", "old_skills")]
    return [*shares, f"{fmean(losses) - fmean(profile.held_out.losses):.4f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-5, 2e-5, 5e-5, 1e-4])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float16"], default=["bfloat16", "float16"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--questions", type=int, default=100, help="questions of each kind")
    options = parser.parse_args()
    names = ("type", "rate", "rule", "reported", "written", "kept", "attack", "old skills", "rise of refusals")
    table = Table(*names, title="Share of the fine-tuned model's safety loss that is left")
    for dtype in (getattr(torch, name) for name in options.dtypes):
        base, tokenizer = load_aligned()
        base.to(dtype)
        profile = collect_profile(base, safety_data(), tokenizer, progress=False)
        examples, whole = CASES["identity"].examples(), ProfileConfig(holdout=0.0)
        task = collect_profile(base, examples, tokenizer, config=whole, progress=False)
        for rate in options.rates:
            tuned = fine_tuned(dtype, rate, options.steps)
            before, kind = loss(tuned, base, profile), str(dtype).removeprefix("torch.")
            scores = measured(tuned, profile, options.questions)
            table.add_row(kind, f"{rate:g}", "none", "", "100%", "1.00", *scores)
            for rule in RULES:
                model = copy.deepcopy(tuned)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of rounding, which the table shows
                    report = adjust_model(
                        model, base=base, profile=profile, task_profile=task, rule=rule, progress=False
                    )
                told, written = report.metrics(), loss(model, base, profile) / before
                table.add_row(
                    kind,
                    f"{rate:g}",
                    f"{rule.name} {rule.strength:g}",
                    f"{told['safedelta/quadratic_loss_share']:.2%}",
                    f"{written:.2%}",
                    f"{told['safedelta/kept_share']:.2f}",
                    *measured(model, profile, options.questions),
                )
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
