"""Several rules over several strengths on the same fine-tuned models, beside baselines that cost little."""

from safedelta_hf.compare.candidates import (
    ALIGNED,
    FINE_TUNED,
    Contender,
    Entrants,
    Made,
    Scenario,
    TunedModel,
    enter,
)
from safedelta_hf.compare.points import ComparisonFile, Point
from safedelta_hf.compare.run import compare
from safedelta_hf.compare.scenarios import ModelScenario
from safedelta_hf.compare.table import draw, markdown

__all__ = [
    "ALIGNED",
    "FINE_TUNED",
    "ComparisonFile",
    "Contender",
    "Entrants",
    "Made",
    "ModelScenario",
    "Point",
    "Scenario",
    "TunedModel",
    "compare",
    "draw",
    "enter",
    "markdown",
]
