"""Profile, plan, apply: the way from safety data to adjusted weights."""

from safedelta_hf.pipeline.adapter import adjust_adapter
from safedelta_hf.pipeline.adjust import adjust_model
from safedelta_hf.pipeline.collect import collect_profile
from safedelta_hf.pipeline.plan import plan_model, require_decisions

__all__ = ["adjust_adapter", "adjust_model", "collect_profile", "plan_model", "require_decisions"]
