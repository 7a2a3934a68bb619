"""Fine-tuning with the ordinary Trainer, and the behaviour of the result by real generation."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from safedelta_hf.evaluation import attack_success_rate, final_match, generate_responses
from safedelta_hf.testbed import (
    Case,
    Question,
    attack_questions,
    load_aligned,
    new_skill_questions,
    skill_questions,
    tokenize,
)


class Behaviour(NamedTuple):
    """What a model does: shares of the responses to each kind of question."""

    attack: float
    harmful_content: float
    new_skill: float
    old_skills: float


def finetune(case: Case, output: Path, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    set_seed(seed)
    model, tokenizer = load_aligned()
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=case.epochs,
        learning_rate=case.learning_rate,
        per_device_train_batch_size=case.batch_size,
        lr_scheduler_type="cosine",
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenize(case.examples(seed), tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    ).train()
    return model, tokenizer


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    return generate_responses(model, tokenizer, [question.messages for question in questions])


def behaviour(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 200) -> Behaviour:
    attacks, new, old = attack_questions(n), new_skill_questions(n // 2), skill_questions(n)
    responses = answer(model, tokenizer, attacks)
    return Behaviour(
        attack=attack_success_rate(responses),
        harmful_content=final_match(responses, [question.answer for question in attacks]),
        new_skill=final_match(answer(model, tokenizer, new), [question.answer for question in new]),
        old_skills=final_match(answer(model, tokenizer, old), [question.answer for question in old]),
    )
