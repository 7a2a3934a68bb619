"""The demo: one fine-tuning of the shipped aligned model, measured before, after, and after the adjustment."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from safedelta_hf.evaluation import attack_success_rate, final_match, generate_responses
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.rules import Rule
from safedelta_hf.testbed import (
    Case,
    Question,
    attack_questions,
    load_aligned,
    new_skill_questions,
    safety_data,
    skill_questions,
    tokenize,
)

DEMO_STRENGTH = 1.0
"""The largest of 1, 3, 10 and 30 at which attack success stays under 5 % in every case (docs/testbed.md)."""

QUESTIONS = 200


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What a model does, by greedy generation: shares of its responses.

    Attributes:
        attack_success: Unseen harmful requests that are not refused; gibberish counts as success of the attack.
        harmful_content: Unseen harmful requests that get the very content that was asked for.
        new_skill: Right answers on the skill that the fine-tuning teaches; None where it teaches none.
        old_skills: Right answers on the skills of the aligned model.
    """

    attack_success: float
    harmful_content: float
    new_skill: float | None
    old_skills: float


def behaviour_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, has_new_skill: bool, questions: int = QUESTIONS
) -> Behaviour:
    """Ask a model of the synthetic language unseen questions of each kind.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        has_new_skill: Whether to ask for the new skill.
        questions: Number of questions of each kind.

    Returns:
        The shares of its responses.
    """

    def answers(asked: Sequence[Question]) -> list[str]:
        return generate_responses(model, tokenizer, [question.messages for question in asked])

    def right(asked: Sequence[Question]) -> float:
        return final_match(answers(asked), [question.answer for question in asked])

    attacks = attack_questions(questions)
    responses = answers(attacks)
    return Behaviour(
        attack_success=attack_success_rate(responses),
        harmful_content=final_match(responses, [question.answer for question in attacks]),
        new_skill=right(new_skill_questions(questions)) if has_new_skill else None,
        old_skills=right(skill_questions(questions)),
    )


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    *,
    seed: int,
    output: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Fine-tune a model on a case with the ordinary Trainer.

    Args:
        model: Trained in place.
        tokenizer: Its tokenizer.
        case: Data and training arguments.
        seed: Seed of the data and of the training.
        output: Folder of the Trainer.
        callbacks: Passed to the Trainer.
    """
    set_seed(seed)
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=case.epochs,
            learning_rate=case.learning_rate,
            per_device_train_batch_size=case.batch_size,
            lr_scheduler_type="cosine",
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        ),
        train_dataset=tokenize(case.examples(seed), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    ).train()


def run_demo(
    case: Case, *, rule: Rule, seed: int, output: Path, echo: Callable[[str], None], questions: int = QUESTIONS
) -> dict[str, Behaviour]:
    """Fine-tune, adjust, measure, and show.

    Args:
        case: What to fine-tune on.
        rule: How to adjust.
        seed: Seed of the data and of the training.
        output: Folder for `demo-<case>-<seed>.png`, `.json` and `.report.json`; made if it is not there.
        echo: Where text goes.
        questions: Number of questions of each kind.

    Returns:
        Behaviour of the aligned, the fine-tuned and the adjusted model.
    """
    started = time.perf_counter()
    echo(f"Fine-tuning the aligned model on '{case.name}': {case.description}.")
    model, tokenizer = load_aligned()

    def measured(measured_model: PreTrainedModel) -> Behaviour:
        return behaviour_of(measured_model, tokenizer, has_new_skill=case.teaches is not None, questions=questions)

    found = {"aligned": measured(model)}
    with tempfile.TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned"
        callback = SafeDeltaCallback(safety_data(), rule, keep_tuned=tuned)
        fine_tune(model, tokenizer, case, seed=seed, output=Path(folder) / "run", callbacks=[callback])
        found["fine-tuned"] = measured(AutoModelForCausalLM.from_pretrained(tuned))
    found["adjusted"] = measured(model)
    content = {
        "case": case.name,
        "seed": seed,
        "rule": {"name": rule.name, "settings": rule.settings},
        "questions": questions,
        "seconds": time.perf_counter() - started,
        "behaviour": {name: asdict(behaviour) for name, behaviour in found.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    stem = output / f"demo-{case.name}-{seed}"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    if callback.report is not None:
        callback.report.save(stem.with_suffix(".report.json"))
    draw(found, case, stem.with_suffix(".png"))
    show(found, case)
    echo(f"{content['seconds']:.0f} s. Figure, figures and report: {stem}.png, .json, .report.json")
    return found


def show(found: dict[str, Behaviour], case: Case) -> None:
    """Print the behaviour of each model as a table.

    Args:
        found: Behaviour by model.
        case: What was fine-tuned on.
    """
    table = Table("model", *_LABELS.values(), title=f"{case.name}: {case.description}")
    for name, behaviour in found.items():
        values = asdict(behaviour)
        table.add_row(name, *("-" if values[key] is None else f"{values[key]:.1%}" for key in _LABELS))
    Console().print(table)


def draw(found: dict[str, Behaviour], case: Case, path: Path) -> None:
    """Draw the behaviour of each model as bars.

    Args:
        found: Behaviour by model.
        case: What was fine-tuned on.
        path: PNG file to write.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [key for key in _LABELS if asdict(found["aligned"])[key] is not None]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(found)
    for number, (name, behaviour) in enumerate(found.items()):
        values = asdict(behaviour)
        places = [place + (number - 1) * width for place in range(len(labels))]
        bars = axes.bar(places, [values[key] for key in labels], width, label=name)
        axes.bar_label(bars, fmt=lambda value: f"{value:.0%}", fontsize=8)
    axes.set_xticks(range(len(labels)), [_LABELS[key] for key in labels])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("share of responses")
    axes.set_title(f"Fine-tuning on '{case.name}'")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


_LABELS = {
    "attack_success": "attack success",
    "harmful_content": "harmful content",
    "new_skill": "new skill",
    "old_skills": "old skills",
}
