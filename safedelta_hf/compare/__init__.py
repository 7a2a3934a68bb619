"""Several rules over several strengths on the same fine-tuned models, beside baselines that cost little."""

from safedelta_hf.compare.candidates import Candidates, choose_candidates, compare
from safedelta_hf.compare.figure import draw
from safedelta_hf.compare.points import ComparisonFile, Point
from safedelta_hf.compare.scenarios import (
    ALIGNED,
    FINE_TUNED,
    FULL,
    LORA,
    WEIGHTS,
    Candidate,
    CandidateModel,
    ModelScenario,
    Scenario,
    TunedModel,
)
from safedelta_hf.compare.table import markdown

__all__ = [
    "ALIGNED",
    "FINE_TUNED",
    "FULL",
    "LORA",
    "WEIGHTS",
    "Candidate",
    "CandidateModel",
    "Candidates",
    "ComparisonFile",
    "ModelScenario",
    "Point",
    "Scenario",
    "TunedModel",
    "choose_candidates",
    "compare",
    "draw",
    "markdown",
]
