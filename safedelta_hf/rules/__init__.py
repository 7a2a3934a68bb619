"""One file per rule. A new rule is one file and one line in `RULES`."""

from safedelta_hf.rules.ridge import Ridge
from safedelta_hf.rules.rule import DeltaStatistics, LayerMoments, Rule
from safedelta_hf.rules.safe_delta import SafeDelta
from safedelta_hf.rules.scale import Scale
from safedelta_hf.rules.strength import AutoStrength
from safedelta_hf.rules.task_ridge import TaskRidge

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (SafeDelta, Ridge, TaskRidge, Scale)}
"""Rules by registered name."""


def default_rule(task: object | None) -> Rule:
    """What measures best on the testbed, at a measured strength.

    Args:
        task: Moments of the task data, if they are at hand.

    Returns:
        The rule.
    """
    return Ridge() if task is None else TaskRidge()


__all__ = [
    "RULES",
    "AutoStrength",
    "DeltaStatistics",
    "LayerMoments",
    "Ridge",
    "Rule",
    "SafeDelta",
    "Scale",
    "TaskRidge",
    "default_rule",
]
