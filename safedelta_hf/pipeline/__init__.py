"""Profile, plan, apply: the way from safety data to adjusted weights."""

from safedelta_hf.pipeline.adapter import adjust_adapter, plan_adapter, require_adjustable
from safedelta_hf.pipeline.adapter_files import adjust_adapter_files
from safedelta_hf.pipeline.adjust import adjust_model
from safedelta_hf.pipeline.checkpoint import adjust_checkpoint
from safedelta_hf.pipeline.checkpoint_plan import plan_checkpoint
from safedelta_hf.pipeline.collect import collect_profile
from safedelta_hf.pipeline.loop import require_measurable
from safedelta_hf.pipeline.merging import require_mergeable
from safedelta_hf.pipeline.plan import plan_model, require_decisions
from safedelta_hf.pipeline.refactor import refactor_adapter

__all__ = [
    "adjust_adapter",
    "adjust_adapter_files",
    "adjust_checkpoint",
    "adjust_model",
    "collect_profile",
    "plan_adapter",
    "plan_checkpoint",
    "plan_model",
    "refactor_adapter",
    "require_adjustable",
    "require_decisions",
    "require_measurable",
    "require_mergeable",
]
