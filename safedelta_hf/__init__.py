"""Safe Delta for Hugging Face: fine-tune an aligned model and keep its refusals."""

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.hf.evaluation import EvaluationCallback
from safedelta_hf.pipeline import adjust_model, collect_profile
from safedelta_hf.records import Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import SafeDelta

__all__ = [
    "EvaluationCallback",
    "Report",
    "SafeDelta",
    "SafeDeltaCallback",
    "SafetyProfile",
    "Treatment",
    "adjust_model",
    "collect_profile",
]
