"""Several rules over several strengths on the same fine-tuned models, beside baselines that cost little."""

from safedelta_hf.evaluation.comparison.contenders import (
    ALIGNED,
    FINE_TUNED,
    Contender,
    Entrants,
    Made,
    Subject,
    TunedModel,
    enter,
)
from safedelta_hf.evaluation.comparison.model import ModelSubject
from safedelta_hf.evaluation.comparison.plot import draw
from safedelta_hf.evaluation.comparison.points import ComparisonFile, Point
from safedelta_hf.evaluation.comparison.run import compare
from safedelta_hf.evaluation.comparison.table import markdown

__all__ = [
    "ALIGNED",
    "FINE_TUNED",
    "ComparisonFile",
    "Contender",
    "Entrants",
    "Made",
    "ModelSubject",
    "Point",
    "Subject",
    "TunedModel",
    "compare",
    "draw",
    "enter",
    "markdown",
]
