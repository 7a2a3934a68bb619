"""The mildest strength that measured refusals allow."""

import math
import warnings
from collections.abc import Callable
from typing import Literal

from safedelta_hf.data.refusals import Drift
from safedelta_hf.errors import FactorisationError, SafeDeltaWarning
from safedelta_hf.records import StrengthSearch, Trial
from safedelta_hf.rules import AutoStrength, Rule

START = 1.0
"""First strength that is tried; the search widens from there."""

STEP = 10.0
"""Ratio of neighbouring strengths until one passes and its neighbour fails."""


def search_strength(rule: Rule, auto: AutoStrength, measure: Callable[[float], Drift], examples: int) -> StrengthSearch:
    """Find the mildest strength of a rule whose drift stays within the tolerance.

    The fine-tuned model is measured first, then strengths ten times apart until one passes and its milder neighbour
    fails, then the geometric middle of the two until they are as close as the precision asks. Refusal is taken to
    come back as strength grows; the strength that is returned was itself measured, so it passes in any case. A strength
    at which the rule cannot factor the moments ends the range.

    Args:
        rule: The rule, for its range.
        auto: Tolerance and precision.
        measure: The drift at a strength.
        examples: Number of refusals behind each measurement, for the record.

    Returns:
        What was tried, and the outcome.

    Raises:
        FactorisationError: There is no strength at which the moments can be factored.
    """
    trials: list[Trial] = []

    def passes(strength: float) -> bool:
        drift = measure(strength)
        passed = max(drift.mean, drift.upper) <= auto.tolerance  # NaN passes nothing
        trials.append(Trial(strength=strength, mean=drift.mean, upper=drift.upper, passed=passed))
        return passed

    def outcome(told: Literal["found", "nothing needed", "strictest fails"], strength: float) -> StrengthSearch:
        return StrengthSearch(
            outcome=told,
            strength=strength,
            tolerance=auto.tolerance,
            quantile=auto.quantile,
            examples=examples,
            trials=tuple(trials),
        )

    if passes(rule.mildest):
        return outcome("nothing needed", rule.mildest)

    def passes_if_solvable(strength: float) -> bool | None:
        try:
            return passes(strength)
        except FactorisationError as error:
            warnings.warn(
                f"{rule.name}: the search stays milder than strength {strength:g} ({error})",
                SafeDeltaWarning,
                stacklevel=2,
            )
            return None

    failing, passing = _bracket(rule, passes_if_solvable)
    if not trials[1:]:
        raise FactorisationError(
            f"{rule.name}: the moments cannot be factored at any strength that a search tries; collect the profile "
            "from more safety data, or use Scale()"
        )
    if passing is None:
        return outcome("strictest fails", trials[-1].strength)
    while failing is not None and abs(math.log(passing / failing)) > math.log(auto.precision):
        middle = math.sqrt(passing * failing)
        if passes_if_solvable(middle):
            passing = middle
        else:
            failing = middle
    return outcome("found", passing)


def _bracket(rule: Rule, passes: Callable[[float], bool | None]) -> tuple[float | None, float | None]:
    """Neighbours of which the milder fails and the stricter passes.

    Args:
        rule: The rule, for its range.
        passes: Whether a strength stays within the tolerance; None if it cannot be measured, nor a stricter one.

    Returns:
        The failing and the passing strength; None where the range ends before there is one.
    """
    mildest, strictest = rule.search_range
    stricter = STEP if strictest > mildest else 1 / STEP
    lowest, highest = sorted((mildest, strictest))
    strength, passed = START, passes(START)
    is_strictest = passed is None
    while passed is None and lowest <= strength / stricter <= highest:
        strength /= stricter
        passed = passes(strength)
    if passed:
        while lowest <= strength / stricter <= highest:
            if not passes(strength / stricter):
                return strength / stricter, strength
            strength /= stricter
        return None, strength
    while not is_strictest and lowest <= strength * stricter <= highest:
        passed = passes(strength * stricter)
        if passed:
            return strength, strength * stricter
        is_strictest = passed is None
        strength = strength if is_strictest else strength * stricter
    return strength, None
