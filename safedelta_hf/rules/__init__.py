"""One file per rule. A new rule is one file and one line in `RULES`; a test asks for its name in `cli.options` too."""

from safedelta_hf.core.transform import DeltaMatrix
from safedelta_hf.errors import ConfigurationError, require_kind
from safedelta_hf.rules.dare import Dare
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule, Source, source_name
from safedelta_hf.rules.model_stock import ModelStock
from safedelta_hf.rules.ridge import Ridge
from safedelta_hf.rules.rule import AutoStrength, LayerMoments, Rule, TransformRule
from safedelta_hf.rules.safe_delta import SafeDelta
from safedelta_hf.rules.safe_merge import SafeMerge
from safedelta_hf.rules.safe_patch import Gradients, SafePatch
from safedelta_hf.rules.scale import Scale
from safedelta_hf.rules.slerp import Slerp
from safedelta_hf.rules.task_ridge import TaskRidge
from safedelta_hf.rules.ties import Ties

RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (SafeDelta, Ridge, TaskRidge, Scale, Slerp, Dare, Ties, ModelStock, SafeMerge, SafePatch)
}
"""Rules by registered name."""


def default_rule(task: object | None) -> Rule:
    """What measures best on the testbed, at a measured strength; the same for every way to adjust.

    Args:
        task: The task data, or what stands for them, if they are at hand.

    Returns:
        The rule.
    """
    return Ridge() if task is None else TaskRidge()


def rule_of(owner: str, rule: object, task: object | None) -> Rule:
    """The rule that an argument names.

    Args:
        owner: What has the argument, for errors.
        rule: A rule; the registered name of one, which is taken with its own settings; None for the default.
        task: The task data, or what stands for them, if they are at hand.

    Returns:
        The rule.

    Raises:
        ConfigurationError: There is no such rule, or it needs settings.
    """
    if rule is None:
        return default_rule(task)
    if isinstance(rule, str):
        if rule not in RULES:
            raise ConfigurationError(f"{owner}: rule={rule!r} is not one of {', '.join(RULES)}")
        return RULES[rule]()
    require_kind(owner, "rule", rule, Rule, "a rule, such as Ridge(), or the name of one")
    assert isinstance(rule, Rule)
    return rule


__all__ = [
    "RULES",
    "AutoStrength",
    "Dare",
    "DeltaMatrix",
    "Gradients",
    "LayerMoments",
    "MergeInput",
    "MergeRule",
    "Merged",
    "ModelStock",
    "Ridge",
    "Rule",
    "SafeDelta",
    "SafeMerge",
    "SafePatch",
    "Scale",
    "Slerp",
    "Source",
    "TaskRidge",
    "Ties",
    "TransformRule",
    "default_rule",
    "rule_of",
    "source_name",
]
