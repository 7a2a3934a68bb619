"""What was done with one parameter, by which rule, and in a polish afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RuleRecord:
    """Name and settings of the rule that was applied."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParameterRecord:
    """What was done with one parameter.

    Attributes:
        parameter: Canonical name.
        shape: Shape of the parameter.
        outcome: "adjusted", "kept", "reset" or "unchanged" (the fine-tuning did not move it).
        reason: Why, where it was not adjusted.
        roles: How the forward pass uses it.
        delta_energy: Squared norm of tuned minus base.
        lost_energy: Squared norm of tuned minus adjusted, as in all figures the weights that were written. Compensation
            and rounding count as lost, so it may exceed the delta's.
        tuned_loss: Quadratic safety loss of the fine-tuned delta, over all uses; None without a moment.
        adjusted_loss: The same of the adjusted delta.
        unrounded_loss: What it was before it was rounded to the data type of the weights; None where that is float32
            or finer.
        notes: Numerical trouble met on the way, such as a retry in float64.
        aliases: Other names of the same (tied) parameter.
        originals: Parameters that it is computed from, if any; the notes say what became of them.
    """

    parameter: str
    shape: tuple[int, ...]
    outcome: str
    reason: str = ""
    roles: tuple[str, ...] = ()
    delta_energy: float = 0.0
    lost_energy: float = 0.0
    tuned_loss: float | None = None
    adjusted_loss: float | None = None
    unrounded_loss: float | None = None
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PolishRecord:
    """What a polish did after the adjustment, in nats per response token of rows that were held out.

    Attributes:
        outcome: "kept"; "undone": refusals came out less likely than is allowed, or the model further from its teachers
            on the mean over the kinds, so the adjusted weights were put back; or "failed", and so were they.
        steps: Optimiser steps.
        learning_rate: Their peak.
        tolerance: How much less likely than under the base refusals were allowed to be.
        quantile: Which quantile had to stay within that besides the mean.
        examples: Number of refusals that were measured.
        rows: Number of rows that it learned from, by kind: "refusals", "task" and "ordinary".
        before: Mean divergence from the teacher, by kind, of the adjusted model.
        after: The same after the polish, also of one that was undone.
        rise_before: How much less likely than under the base the adjusted model finds refusals: mean, upper quantile.
        rise_after: The same after the polish; None of one that failed.
        reason: Why, if it was not kept.
    """

    outcome: Literal["kept", "undone", "failed"]
    steps: int
    learning_rate: float
    tolerance: float
    quantile: float
    examples: int
    rows: Mapping[str, int] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    rise_before: tuple[float, float] | None = None
    rise_after: tuple[float, float] | None = None
    reason: str = ""

    @property
    def summary(self) -> str:
        """What was done, in a sentence or two."""
        if self.outcome == "failed":
            return f"Not polished: {self.reason}. The weights are those of the adjustment."
        apart = ", ".join(f"{kind} {self.before[kind]:.3g} -> {self.after[kind]:.3g}" for kind in self.before)
        assert self.rise_before is not None and self.rise_after is not None, "measured unless it failed"
        (_, before), (mean, upper) = self.rise_before, self.rise_after
        measured = (
            f"divergence from the teachers in nats per token of held-out rows: {apart}; held-out refusals {mean:.3g} "
            f"nats per token less likely than under the base ({upper:.3g} at the {self.quantile:.0%} quantile of "
            f"{self.examples}, {before:.3g} before; allowed {self.tolerance:g})"
        )
        if self.outcome == "undone":
            return (
                f"A polish of {self.steps} steps made refusals less likely than is allowed and was undone: {measured}."
            )
        return f"Then polished in {self.steps} steps at a peak rate of {self.learning_rate:.2g}: {measured}."

    @property
    def warning(self) -> str:
        """What has to be known before anything else; empty if the polish was kept."""
        return "" if self.outcome == "kept" else f"THE MODEL WAS NOT POLISHED. {self.summary}"

    def metrics(self) -> dict[str, float]:
        """Scalars for a log.

        Returns:
            Values by name.
        """
        found = {"polish_steps": float(self.steps), "polish_kept": float(self.outcome == "kept")}
        found |= {f"polish_divergence_{kind}_before": value for kind, value in self.before.items()}
        found |= {f"polish_divergence_{kind}_after": value for kind, value in self.after.items()}
        if self.rise_after is not None:
            mean, upper = self.rise_after
            found |= {"polish_refusal_rise_mean": mean, "polish_refusal_rise_upper": upper}
        return found
