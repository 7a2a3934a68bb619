"""How a model behaves: what it refuses, what it should not refuse, and what it can do."""

import safedelta_hf.data.phrases

from .audit import Audit, AuditedRow, audit_data
from .evaluate import evaluate_model
from .generation import generate_responses, model_digest
from .guard import FORMATS, Cue, Guard, GuardFormat, Verdict, guarded_responses
from .harness import HarnessTasks, harness_scores
from .landscape import Interpolation, Landscape, interpolation, safety_landscape
from .likelihood import Likelihood, Reference, is_degenerate, refusal_likelihood
from .metrics import (
    Metric,
    generated_accuracy,
    generated_attack_success,
    refusal_improbability,
)
from .questions import Prompt, Questions, read_prompts
from .result import Evaluation, Score
from .scans import Scans
from .scoring import (
    Judge,
    ModelJudge,
    attack_success_rate,
    exact_answer,
    exact_match,
    final_answer,
    final_match,
)

REFUSAL_PHRASES = safedelta_hf.data.phrases.REFUSAL_PHRASES  # lazy_loader reads imports of this room alone
is_refusal = safedelta_hf.data.phrases.is_refusal

__all__ = [
    "FORMATS",
    "REFUSAL_PHRASES",
    "Audit",
    "AuditedRow",
    "Cue",
    "Evaluation",
    "Guard",
    "GuardFormat",
    "HarnessTasks",
    "Interpolation",
    "Judge",
    "Landscape",
    "Likelihood",
    "Metric",
    "ModelJudge",
    "Prompt",
    "Questions",
    "Reference",
    "Scans",
    "Score",
    "Verdict",
    "attack_success_rate",
    "audit_data",
    "evaluate_model",
    "exact_answer",
    "exact_match",
    "final_answer",
    "final_match",
    "generate_responses",
    "generated_accuracy",
    "generated_attack_success",
    "guarded_responses",
    "harness_scores",
    "interpolation",
    "is_degenerate",
    "is_refusal",
    "model_digest",
    "read_prompts",
    "refusal_improbability",
    "refusal_likelihood",
    "safety_landscape",
]
