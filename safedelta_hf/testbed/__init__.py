"""A synthetic language, a tiny aligned model of it, and the data to break and repair its refusals with."""

from safedelta_hf.testbed.behaviour import behaviour_scores
from safedelta_hf.testbed.cases import CASES, Case
from safedelta_hf.testbed.data import (
    attack_questions,
    new_skill_questions,
    ordinary_data,
    safety_data,
    skill_questions,
)
from safedelta_hf.testbed.finetune import fine_tune
from safedelta_hf.testbed.language import Conversation, Question
from safedelta_hf.testbed.model import ALIGNED_MODEL, load_aligned
from safedelta_hf.testbed.tokenizer import tokenize

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
    "safety_data",
    "skill_questions",
    "tokenize",
]
