"""One file per rule. A new rule is one file and one line in `RULES`."""

from safedelta_hf.rules.rule import DeltaStatistics, Rule
from safedelta_hf.rules.safe_delta import SafeDelta

RULES: dict[str, type[SafeDelta]] = {SafeDelta.name: SafeDelta}
"""Rules by registered name."""

__all__ = ["RULES", "DeltaStatistics", "Rule", "SafeDelta"]
