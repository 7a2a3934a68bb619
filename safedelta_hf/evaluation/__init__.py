"""How a model behaves: its generated responses, refusals among them, and right answers."""

from safedelta_hf.evaluation.generation import generate_responses
from safedelta_hf.evaluation.scoring import (
    REFUSAL_PHRASES,
    attack_success_rate,
    exact_match,
    final_match,
    is_refusal,
)

__all__ = [
    "REFUSAL_PHRASES",
    "attack_success_rate",
    "exact_match",
    "final_match",
    "generate_responses",
    "is_refusal",
]
