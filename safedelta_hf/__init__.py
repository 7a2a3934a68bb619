"""Safe Delta for Hugging Face: fine-tune an aligned model and keep its refusals."""

from importlib.metadata import version

from safedelta_hf.adapter.adjust import adjust_adapter, plan_adapter
from safedelta_hf.adapter.files import adjust_adapter_files
from safedelta_hf.adapter.refactor import refactor_adapter
from safedelta_hf.capture.collect import Checkpointing, collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.checkpoint.adjust import adjust_checkpoint
from safedelta_hf.checkpoint.plan import CheckpointPlan, plan_checkpoint
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.hf.evaluation import EvaluationCallback
from safedelta_hf.model.adjust import adjust_model, plan_model
from safedelta_hf.profile.encodings import Eigenbasis
from safedelta_hf.profile.profile import SafetyProfile, with_retention
from safedelta_hf.records import Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import (
    AutoStrength,
    Dare,
    ModelStock,
    Ridge,
    SafeDelta,
    SafeMerge,
    Scale,
    Slerp,
    TaskRidge,
    Ties,
)

__version__ = version("safedelta-hf")

__all__ = [
    "AutoStrength",
    "CheckpointPlan",
    "Checkpointing",
    "Dare",
    "Eigenbasis",
    "EvaluationCallback",
    "ModelStock",
    "ProfileConfig",
    "Report",
    "Ridge",
    "SafeDelta",
    "SafeDeltaCallback",
    "SafeMerge",
    "SafetyProfile",
    "Scale",
    "Slerp",
    "TaskRidge",
    "Ties",
    "Treatment",
    "__version__",
    "adjust_adapter",
    "adjust_adapter_files",
    "adjust_checkpoint",
    "adjust_model",
    "collect_profile",
    "plan_adapter",
    "plan_checkpoint",
    "plan_model",
    "refactor_adapter",
    "with_retention",
]
