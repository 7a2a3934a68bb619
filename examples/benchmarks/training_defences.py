"""What defences in the training step do to a fine-tuning of the testbed, beside the baseline that costs least.

python examples/benchmarks/training_defences.py --case benign --seeds 0 1

Attack success on unseen harmful requests, right answers to the new skill and to the old ones, loss on unseen examples
of the fine-tuning data, seconds of training. The baseline "mixed in" adds the safe replies of the probe's own pairs to
the data.
"""

import argparse
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainingArguments, set_seed

from safedelta_hf import collect_profile, with_retention
from safedelta_hf.testbed import (
    CASES,
    behaviour_scores,
    load_aligned,
    ordinary_data,
    preference_pairs,
    safety_data,
    tokenize,
)
from safedelta_hf.training import ProjectedTraining, SafetyProbeConfig, with_safety_probe

PAIRS = preference_pairs(50)
Make = Callable[..., Trainer]


def probed(**settings: object) -> Make:
    """A Trainer whose steps are probed."""
    config = SafetyProbeConfig(pairs=PAIRS, **settings)
    return lambda **keywords: with_safety_probe(Trainer)(**keywords, probe=config)


def projected(retention: float = 0.0, **settings: object) -> Make:
    """A Trainer whose delta is projected."""

    def make(**keywords: object) -> Trainer:
        model, tokenizer = load_aligned()
        profile = collect_profile(model, safety_data(), tokenizer, progress=False)
        if retention:
            ordinary = collect_profile(model, ordinary_data(), tokenizer, progress=False)
            profile = with_retention(profile, ordinary, retention)
        return Trainer(**keywords, callbacks=[ProjectedTraining(profile=profile, **settings)])

    return make


DEFENCES: dict[str, Make] = {
    "plain": Trainer,
    "mixed in": Trainer,
    "probe": probed(),
    "probe, epsilon 0.1": probed(epsilon=0.1),
    "probe, beta 0.5": probed(beta=0.5, epsilon=1e-3),
    "projected, 0.001": projected(strength=1e-3),
    "projected, 0.001, retention 0.3": projected(0.3, strength=1e-3),
    "projected, 0.01, retention 0.3": projected(0.3, strength=1e-2),
    "hard, 0.01": projected(hard=0.01),
    "hard, 0.001": projected(hard=0.001),
}


def trained(name: str, case_name: str, seed: int) -> tuple[PreTrainedModel, float, float]:
    """Fine-tune the aligned model, and say how long that took, and its loss on unseen data of the same kind."""
    case, (model, tokenizer) = CASES[case_name], load_aligned()
    examples = case.examples(seed)
    if name == "mixed in":
        examples += [{"messages": row["prompt"] + row["chosen"]} for row in PAIRS]
    set_seed(seed)
    with TemporaryDirectory() as folder:
        trainer = DEFENCES[name](
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=case.epochs,
                learning_rate=case.learning_rate,
                per_device_train_batch_size=case.batch_size,
                lr_scheduler_type="cosine",
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=tokenize(examples, tokenizer),
            eval_dataset=tokenize(case.examples(seed + 1000)[:200], tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            processing_class=tokenizer,
        )
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        return model, seconds, trainer.evaluate()["eval_loss"]


def main() -> None:
    """Train, measure, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES, default="benign")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--defences", nargs="+", choices=DEFENCES, default=list(DEFENCES))
    options = parser.parse_args()
    columns = ("case, seed", "defence", "attack", "new skill", "old skills", "nats per token", "CPU seconds")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for seed in options.seeds:
        for name in options.defences:
            model, seconds, loss = trained(name, options.case, seed)
            teaches = CASES[options.case].teaches is not None
            scores = behaviour_scores(
                model.eval(), load_aligned()[1], has_new_skill=teaches, questions=options.questions
            )
            shares = [
                f"{scores[kind].value:.3f}" if kind in scores else "-"
                for kind in ("attack_success", "new_skill", "old_skills")
            ]
            print(f"| {options.case} {seed} | {name} | {' | '.join(shares)} | {loss:.3f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
