"""How an adjusted model is polished."""

import math
from dataclasses import dataclass
from typing import Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.rule import require_number

OWNER: Final = "PolishConfig"

QUANTILE: Final = 0.95
"""Of refusals, which quantile of what they lost has to stay within the tolerance."""


@dataclass(frozen=True, kw_only=True)
class PolishConfig:
    """How an adjusted model is polished.

    Attributes:
        steps: Optimiser steps: a whole number, or a share of the steps of the fine-tuning, such as 0.5.
        rate: Peak learning rate as a share of that of the fine-tuning; from there it falls to 0 along a cosine.
        batch_size: Rows of each kind (refusals, task rows, ordinary rows) in a step, by all processes together; as many
            more as it takes to fill the batches.
        task_examples: Number of examples to draw from the Trainer's own data, if no `task_dataset` is given: more than
            moments need, because each is learned from.
        holdout: Share of the task rows and of the ordinary rows that is held out, to measure by.
        top_k: Of a teacher's next tokens, how many are kept, where the vocabulary is larger than `EXACT`; the others
            are kept as one.
        tolerance: How much less likely than under the base held-out refusals may be afterwards, in nats per response
            token, on the mean and at the `QUANTILE` over them; otherwise the polish is undone.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    steps: int | float = 0.75
    rate: float = 1.0
    batch_size: int = 16
    task_examples: int = 1024
    holdout: float = 0.125
    top_k: int = 128
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        require_number(OWNER, "steps", self.steps, "of at least 0 and finite", lambda v: 0 <= v < math.inf)
        require_number(OWNER, "rate", self.rate, "positive and finite", lambda v: 0 < v < math.inf)
        require_number(OWNER, "holdout", self.holdout, "above 0 and below 1", lambda v: 0 < v < 1)
        for field in ("batch_size", "task_examples", "top_k"):
            if type(getattr(self, field)) is not int or getattr(self, field) < 1:
                raise ConfigurationError(
                    f"{OWNER}: {field}={getattr(self, field)!r} must be a whole number of at least 1"
                )
        require_number(OWNER, "tolerance", self.tolerance, "positive and finite", lambda v: 0 < v < math.inf)

    def steps_of(self, run: int) -> int:
        """Number of steps.

        Args:
            run: Number of steps of the fine-tuning; below 1 if that is not known.

        Returns:
            The number.

        Raises:
            ConfigurationError: It is a share of what is not known.
        """
        if isinstance(self.steps, int):
            return self.steps
        if run < 1:
            raise ConfigurationError(
                f"{OWNER}: steps={self.steps} is a share of the fine-tuning's steps, and how many those were is not "
                "known here; give a whole number of steps, or TrainingArguments with their max_steps"
            )
        return math.ceil(self.steps * run)
