"""What can be measured of a model over and over: one number each, by generation or by likelihood."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedModel

from safedelta_hf.data.dataset import Source, tokenizer_digest
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.evaluation.generation import generate_responses
from safedelta_hf.evaluation.likelihood import refusal_likelihood
from safedelta_hf.evaluation.questions import PromptSource, digest_of_prompts, read_prompts
from safedelta_hf.evaluation.scoring import TaskScore, attack_success_rate


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Something that is measured of a model at each place.

    Attributes:
        name: What it is called in tables and figures.
        measure: Called with the model as it is at that place; returns a finite number. In a landscape it is how unsafe
            the model is, from 0 to 1.
        fingerprint: What it depends on beside the model, by which a run that goes on tells it from others.
    """

    name: str
    measure: Callable[[PreTrainedModel], float]
    fingerprint: str = ""


def generated_attack_success(
    processing_class: ProcessingClass, prompts: PromptSource, *, max_new_tokens: int = 32, batch_size: int = 8
) -> Metric:
    """Share of harmful prompts whose greedy response holds no refusal phrase; gibberish counts, as in the paper.

    Args:
        processing_class: Tokenizer or processor, with a chat template.
        prompts: Harmful prompts; the paper has 80 of AdvBench.
        max_new_tokens: Length limit of a response, in tokens; the paper has 512.
        batch_size: Prompts per forward pass.

    Returns:
        The metric; it costs a generation for each prompt and place.
    """
    return _generated(
        "attack_success",
        processing_class,
        prompts,
        lambda text, _: attack_success_rate([text]),
        max_new_tokens,
        batch_size,
    )


def generated_accuracy(
    processing_class: ProcessingClass,
    prompts: PromptSource,
    score: TaskScore,
    *,
    max_new_tokens: int = 32,
    batch_size: int = 8,
) -> Metric:
    """Mean score of the greedy responses to the questions of a task.

    Args:
        processing_class: Tokenizer or processor, with a chat template.
        prompts: Questions.
        score: Called with a response and its row; returns how right it is, from 0 to 1.
        max_new_tokens: Length limit of a response, in tokens.
        batch_size: Prompts per forward pass.

    Returns:
        The metric; it costs a generation for each question and place.
    """
    return _generated("task_accuracy", processing_class, prompts, score, max_new_tokens, batch_size)


def _generated(
    name: str,
    processing_class: ProcessingClass,
    source: PromptSource,
    score: TaskScore,
    max_new_tokens: int,
    batch_size: int,
) -> Metric:
    prompts = read_prompts(source, name)

    def measure(model: PreTrainedModel) -> float:
        responses = generate_responses(
            model,
            processing_class,
            [prompt.messages for prompt in prompts],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        return fmean(float(score(text, prompt.row)) for text, prompt in zip(responses, prompts, strict=True))

    parts = (digest_of_prompts(prompts), str(tokenizer_digest(processing_class)), str(max_new_tokens))
    return Metric(name=name, measure=measure, fingerprint=" ".join(parts))


def refusal_improbability(
    processing_class: ProcessingClass,
    refusals: Source,
    *,
    batch_size: int = 8,
) -> Metric:
    """How improbable a model finds given refusals: `1 - exp(-loss)`, the loss in nats per token, mean over examples.

    One forward pass for each place instead of a generation, and smooth where attack success counts yes and no.

    Args:
        processing_class: Tokenizer or processor.
        refusals: Prompts with the refusals to them, in any form that TRL takes.
        batch_size: Sequences per forward pass, at most.

    Returns:
        The metric, from 0 (certain to refuse so) to 1.
    """
    rows = refusals if isinstance(refusals, str | Path) else list(refusals)

    def measure(model: PreTrainedModel) -> float:
        losses = refusal_likelihood(model, rows, processing_class, batch_size=batch_size).losses
        return fmean(1 - math.exp(-loss) for loss in losses)

    content = Path(rows).read_bytes() if isinstance(rows, str | Path) else json.dumps(rows, default=str).encode()
    fingerprint = f"{hashlib.sha256(content).hexdigest()} {tokenizer_digest(processing_class)}"
    return Metric(name="refusal_improbability", measure=measure, fingerprint=fingerprint)
