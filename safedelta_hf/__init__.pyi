"""The public names, and where they are; imported when they are first used."""

from .adapter.adjust import adjust_adapter, plan_adapter
from .adapter.files import adjust_adapter_files
from .adapter.refactor import refactor_adapter
from .capture.collect import Checkpointing, collect_profile
from .capture.config import ProfileConfig
from .checkpoint.adjust import adjust_checkpoint
from .checkpoint.plan import CheckpointPlan, plan_checkpoint
from .hf.callback import SafeDeltaCallback
from .hf.evaluation import EvaluationCallback
from .model.adjust import adjust_model, plan_model
from .polish.config import PolishConfig
from .polish.polish import polish_model
from .profile.encodings import Eigenbasis
from .profile.profile import SafetyProfile, with_ordinary
from .records.plan import Treatment
from .report import Report
from .rules import (
    AutoStrength,
    Dare,
    ModelStock,
    Ridge,
    SafeDelta,
    SafeMerge,
    SafePatch,
    Scale,
    Slerp,
    TaskRidge,
    Ties,
)
from .saved.adjust import adjust_saved

__version__: str

__all__ = [
    "AutoStrength",
    "CheckpointPlan",
    "Checkpointing",
    "Dare",
    "Eigenbasis",
    "EvaluationCallback",
    "ModelStock",
    "PolishConfig",
    "ProfileConfig",
    "Report",
    "Ridge",
    "SafeDelta",
    "SafeDeltaCallback",
    "SafeMerge",
    "SafePatch",
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
    "adjust_saved",
    "collect_profile",
    "plan_adapter",
    "plan_checkpoint",
    "plan_model",
    "polish_model",
    "refactor_adapter",
    "with_ordinary",
]
