"""How a model behaves: what it refuses, what it should not refuse, and what it can do."""

from safedelta_hf.data.phrases import REFUSAL_PHRASES, is_refusal
from safedelta_hf.evaluation.audit import Audit, AuditedRow, audit_data
from safedelta_hf.evaluation.evaluate import evaluate_model
from safedelta_hf.evaluation.generation import generate_responses, model_digest
from safedelta_hf.evaluation.guard import FORMATS, Cue, Guard, GuardFormat, Verdict, guarded_responses
from safedelta_hf.evaluation.harness import HarnessTasks, harness_scores
from safedelta_hf.evaluation.landscape import Interpolation, Landscape, interpolation, safety_landscape
from safedelta_hf.evaluation.likelihood import Likelihood, Reference, is_degenerate, refusal_likelihood
from safedelta_hf.evaluation.metrics import (
    Metric,
    generated_accuracy,
    generated_attack_success,
    refusal_improbability,
)
from safedelta_hf.evaluation.questions import Prompt, Questions, read_prompts
from safedelta_hf.evaluation.result import Evaluation, Score
from safedelta_hf.evaluation.scans import Scans
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
