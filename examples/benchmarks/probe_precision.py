"""How near the direction of a safety probe comes to that of float64, in each precision and at each size of the move.

python examples/benchmarks/probe_precision.py
"""

import tempfile
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments

import safedelta_hf.training.safety_probe as probing
from safedelta_hf.testbed import CASES, load_aligned, preference_pairs, tokenize
from safedelta_hf.training import SafetyProbeConfig, with_safety_probe

EPSILONS = (2e-5, 1e-3, 1e-1)


class Exact(Trainer):
    """Takes the loss in the precision of the model: that of transformers is in float32."""

    def compute_loss(self, model: nn.Module, inputs: dict, *_: object, **__: object) -> Tensor:
        """Mean over label tokens."""
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(logits.transpose(1, 2), inputs["labels"][:, 1:])


def lora(model: PreTrainedModel, dropout: float = 0.0) -> nn.Module:
    """A LoRA that has been trained a little, as far as its size goes."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def offsets(model: nn.Module, epsilon: float, kind: type[Trainer] = Exact, **arguments: object) -> Tensor:
    """The offsets of one batch, as one vector."""
    _, tokenizer = load_aligned()
    with tempfile.TemporaryDirectory() as folder:
        trainer = with_safety_probe(kind)(
            model=model,
            args=TrainingArguments(output_dir=folder, report_to="none", use_cpu=True, **arguments),
            train_dataset=tokenize(CASES["benign"].examples()[:16], tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            processing_class=tokenizer,
            probe=SafetyProbeConfig(pairs=preference_pairs(8), epsilon=epsilon, normalise="none", beta=1.0),
        )
        trainer.accelerator.prepare_model(model, evaluation_mode=True)
        batch = next(iter(trainer.get_train_dataloader()))
        torch.manual_seed(1)
        found = trainer.safety_probe.offsets(trainer, model, batch, None)
    return torch.cat([offset.double() for offset in found.values()])


def aligned(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The aligned model of the testbed."""
    return load_aligned()[0].to(dtype)


def coarse(dtype: torch.dtype) -> nn.Module:
    """A LoRA in float32 on a base in another type, which is refused but for this."""
    probing.ROUNDING_STEPS = 0
    model = lora(aligned())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def other_masks() -> nn.Module:
    """With a random state of its own for each pass, as in the authors' code."""
    probing.random_state_kept = lambda model: torch.random.fork_rng(enabled=False)
    return lora(aligned(), dropout=0.1)


SETTINGS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "full, float32": (aligned, lambda: aligned(torch.float64)),
    "LoRA, float32": (lambda: lora(aligned()), lambda: lora(aligned()).double()),
    "LoRA in float32, base in bfloat16": (
        lambda: coarse(torch.bfloat16),
        lambda: lora(aligned()).double(),
    ),
    "LoRA, dropout 0.1, masks of their own": (other_masks, lambda: lora(aligned()).double()),
}


def main() -> None:
    """Print a table of cosines and sizes."""
    print("| | " + " | ".join(f"epsilon {epsilon:g}" for epsilon in EPSILONS) + " |\n|---|" + "---|" * len(EPSILONS))
    for name, (make, exact) in SETTINGS.items():
        cells = []
        for epsilon in EPSILONS:
            wanted = offsets(exact(), epsilon)
            found = offsets(make(), epsilon)
            cosine = float(nn.functional.cosine_similarity(wanted, found, dim=0))
            cells.append(f"{cosine:.3f} ({float(found.norm() / wanted.norm()):.3g})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
