"""How a model behaves: what it refuses, what it should not refuse, and what it can do."""

from safedelta_hf.data.phrases import REFUSAL_PHRASES, is_refusal
from safedelta_hf.evaluation.evaluate import evaluate_model
from safedelta_hf.evaluation.generation import generate_responses, model_digest
from safedelta_hf.evaluation.harness import HarnessTasks, harness_scores
from safedelta_hf.evaluation.likelihood import Likelihood, Reference, is_degenerate, refusal_likelihood
from safedelta_hf.evaluation.questions import Prompt, Questions, read_prompts
from safedelta_hf.evaluation.result import Evaluation, Score
from safedelta_hf.evaluation.scoring import (
    Judge,
    ModelJudge,
    attack_success_rate,
    exact_answer,
    exact_match,
    final_answer,
    final_match,
)

__all__ = [
    "REFUSAL_PHRASES",
    "Evaluation",
    "HarnessTasks",
    "Judge",
    "Likelihood",
    "ModelJudge",
    "Prompt",
    "Questions",
    "Reference",
    "Score",
    "attack_success_rate",
    "evaluate_model",
    "exact_answer",
    "exact_match",
    "final_answer",
    "final_match",
    "generate_responses",
    "harness_scores",
    "is_degenerate",
    "is_refusal",
    "model_digest",
    "read_prompts",
    "refusal_likelihood",
]
