"""A synthetic language, a tiny aligned model of it, and the data to break and repair its refusals with."""

from safedelta_hf.testbed.data import (
    CASES,
    Case,
    attack_questions,
    new_skill_questions,
    ordinary_data,
    preference_pairs,
    safety_data,
    skill_questions,
)
from safedelta_hf.testbed.language import Conversation, Question
from safedelta_hf.testbed.model import ALIGNED_MODEL, behaviour_scores, fine_tune, load_aligned, tokenize

__all__ = [
    "ALIGNED_MODEL",
    "CASES",
    "Case",
    "Conversation",
    "Question",
    "attack_questions",
    "behaviour_scores",
    "fine_tune",
    "load_aligned",
    "new_skill_questions",
    "ordinary_data",
    "preference_pairs",
    "safety_data",
    "skill_questions",
    "tokenize",
]
