"""The demo's own fine-tuning, without the callback, and plain answers to questions."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safedelta_hf.evaluation import generate_responses
from safedelta_hf.testbed import Case, Question, fine_tune, load_aligned


def finetune(case: Case, output: Path, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_aligned()
    fine_tune(model, tokenizer, case, seed=seed, output=output)
    return model, tokenizer


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    return generate_responses(model, tokenizer, [question.messages for question in questions])
