"""What a polish gives and costs on the testbed: attack success, new skill, old skills, CPU seconds.

python examples/benchmarks/polish.py --case mixed --seed 0 --steps 0.75 --ordinary 128
python examples/benchmarks/polish.py --case skill --seed 0 --lora

Examples that the aligned model refuses are left out of the task, for the adjustment and for the polish. Old skills are
asked for twice: all questions, and those whose prompts are not among the ordinary rows; two of the skills are facts, of
which a few dozen exist.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, TrainingArguments

from safedelta_hf import (
    PolishConfig,
    ProfileConfig,
    TaskRidge,
    adjust_adapter,
    adjust_model,
    collect_profile,
    polish_model,
)
from safedelta_hf.evaluation import final_match, generate_responses, is_refusal
from safedelta_hf.testbed import (
    CASES,
    Case,
    Conversation,
    behaviour_scores,
    fine_tune,
    load_aligned,
    ordinary_data,
    safety_data,
    skill_questions,
)

EXAMPLES = 256
"""Of the task, behind the adjustment."""


def tuned(case: Case, seed: int, folder: str, *, lora: bool) -> tuple[PreTrainedModel, float]:
    """The aligned model, fine-tuned, and the CPU seconds of that."""
    model, tokenizer = load_aligned()
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    started = time.process_time()
    fine_tune(model, tokenizer, case, seed=seed, output=folder, progress=False)
    return model, time.process_time() - started


def last_request(row: Conversation) -> str:
    """What the user asked."""
    return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")


def scores(model: PreTrainedModel, case: Case, ordinary: Sequence[Conversation], questions: int) -> str:
    """Figures of a model, for a line of a table."""
    _, tokenizer = load_aligned()
    found = behaviour_scores(model.eval(), tokenizer, has_new_skill=case.teaches is not None, questions=questions)
    seen = {last_request(row) for row in ordinary}
    apart = [one for one in skill_questions(questions) if one.messages[-1]["content"] not in seen]
    answers = generate_responses(model, tokenizer, [question.messages for question in apart])
    right = sum(final_match([said], [one.answer]) for said, one in zip(answers, apart, strict=True)) / len(apart)
    wanted = ("attack_success", "new_skill", "old_skills")
    told = " ".join(f"{name} {found[name].value:.3f}" for name in wanted if name in found)
    return f"{told} old_skills_apart {right:.3f} ({len(apart)})"


def main() -> None:
    """Fine-tune, adjust, polish, and ask after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=float, default=PolishConfig().steps)
    parser.add_argument("--rate", type=float, default=PolishConfig().rate)
    parser.add_argument("--ordinary", type=int, default=128, help="number of ordinary rows; 0 for none")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    case = replace(CASES[options.case], learning_rate=2.5e-3) if options.lora else CASES[options.case]
    base, tokenizer = load_aligned()
    examples = case.examples(options.seed)
    said = generate_responses(base, tokenizer, [row["messages"][:-1] for row in examples])
    task = [row for row, answer in zip(examples, said, strict=True) if not is_refusal(answer)]
    ordinary = ordinary_data(options.ordinary, seed=7) if options.ordinary else []
    profile = collect_profile(base, safety_data(), tokenizer, progress=False)
    with TemporaryDirectory() as folder:
        model, seconds = tuned(case, options.seed, folder, lora=options.lora)
        print("fine-tuned:", scores(model, case, ordinary, options.questions), f"{seconds:.0f} s", flush=True)
        model.save_pretrained(f"{folder}/tuned")
        tokenizer.save_pretrained(f"{folder}/tuned")
        weighed = collect_profile(
            base, task[:EXAMPLES], tokenizer, config=ProfileConfig(holdout=0.0), purpose="task data", progress=False
        )
        settings = {"profile": profile, "rule": TaskRidge(), "task": weighed, "progress": False}
        report = adjust_adapter(model, **settings) if options.lora else adjust_model(model, base=base, **settings)
        print(f"adjusted ({len(task)} of {len(examples)} rows):", scores(model, case, ordinary, options.questions))
        print(report.search.summary, flush=True)
        steps = case.epochs * -(-len(examples) // case.batch_size)
        started = time.process_time()
        record = polish_model(
            model,
            safety_data(),
            base=base,
            tuned=load_tuned(f"{folder}/tuned", lora=options.lora),
            task_dataset=task,
            ordinary_dataset=ordinary or None,
            args=TrainingArguments(
                output_dir=folder,
                learning_rate=case.learning_rate,
                per_device_train_batch_size=48,
                max_steps=steps,
                seed=options.seed,
            ),
            config=PolishConfig(steps=options.steps, rate=options.rate),
            processing_class=tokenizer,
            progress=False,
        )
        seconds = time.process_time() - started
    print("polished:", scores(model, case, ordinary, options.questions), f"{seconds:.0f} s")
    print(record.summary)


def load_tuned(folder: str, *, lora: bool) -> PreTrainedModel:
    """What was saved, on a base of its own if it is an adapter."""
    if not lora:
        return type(load_aligned()[0]).from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(load_aligned()[0], folder)


if __name__ == "__main__":
    main()
