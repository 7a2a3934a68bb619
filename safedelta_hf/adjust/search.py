"""The mildest strength that measured refusals allow."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from safedelta_hf.core.binomial import upper_bound
from safedelta_hf.data.refusals import Drift
from safedelta_hf.errors import FactorisationError, warn
from safedelta_hf.report.search import StrengthSearch, Trial
from safedelta_hf.rules import AutoStrength, Rule

START = 3.0
"""First strength that is tried beside the mildest: between those that were found in most cases of the testbed."""

STEP = 5.0
"""Ratio of neighbouring strengths until one passes and its milder neighbour fails."""


def search_strength(
    rule: Rule,
    auto: AutoStrength,
    measure: Callable[[float], Drift],
    refusals: int,
    others: int = 0,
    tell: Callable[[Trial], None] = lambda _: None,
) -> StrengthSearch:
    """Find the mildest strength of a rule that loses no more refusals than may be lost.

    Strengths lie on a grid that the rule and the precision fix beforehand. As a fixed sequence of tests (Learn then
    Test, arXiv 2110.01052) they would be tried from the strictest on, until one loses too many; the one before is
    chosen, and the bound holds for it however many were tried. Where milder strengths lose no fewer refusals, it is
    found in a few trials instead: the rule at its mildest first, then strengths five times apart until one passes and
    its milder neighbour fails, then by halving. Where those that were tried show that a milder strength loses fewer,
    the strengths in question are tried one after another.

    Args:
        rule: The rule, for its range.
        auto: What may be lost.
        measure: What is lost at a strength.
        refusals: Number of held-out refusals that can be lost.
        others: Number of those that cannot, as the base does not surely begin them.
        tell: Is told of each trial.

    Returns:
        What was tried, and the outcome.

    Raises:
        FactorisationError: There is no strength at which the moments can be factored.
    """
    certifiable = auto.allowed(refusals)
    allowed = certifiable or 0
    walk = _Walk(rule, auto, measure, allowed, tell)
    outcome, strength = walk.outcome()
    trials = tuple(walk.found.values())  # in the order in which they were tried
    lost = max(allowed, next(trial.lost for trial in trials if trial.strength == strength))
    bound = upper_bound(lost, refusals, auto.confidence)
    return StrengthSearch(
        outcome=outcome,
        strength=strength,
        share=auto.share,
        confidence=auto.confidence,
        examples=refusals,
        others=others,
        allowed=allowed,
        bound=bound,
        holds=bound <= auto.share or (auto.lost is None and certifiable is None and refusals > 0 and lost == 0),
        more=0 if bound <= auto.share else auto.needed(lost) - refusals,
        trials=trials,
    )


def strengths_of(rule: Rule, precision: float) -> list[float]:
    """The strengths that a search may try, besides the mildest.

    Args:
        rule: The rule, for its range.
        precision: Ratio of neighbours, at most.

    Returns:
        From the strictest to the mildest of its range, geometrically spaced.
    """
    mildest, strictest = rule.search_range
    steps = math.ceil(abs(math.log(strictest / mildest)) / math.log(precision) - 1e-9)
    return [strictest * (mildest / strictest) ** (step / steps) for step in range(steps)] + [mildest]


@dataclass
class _Walk:
    """A search on its way. Places are grid points counted from the strictest; the rule at its mildest is the last."""

    rule: Rule
    auto: AutoStrength
    measure: Callable[[float], Drift]
    allowed: int
    tell: Callable[[Trial], None]
    found: dict[int, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.grid = [*strengths_of(self.rule, self.auto.precision), self.rule.mildest]
        self.strictest = 0  # of those at which the moments can be factored

    def outcome(self) -> tuple[Literal["found", "nothing needed", "strictest fails"], float]:
        last = len(self.grid) - 1
        if self.passes(last):
            return "nothing needed", self.grid[last]
        passing = self._halved(last)
        if self.strictest == last:
            raise FactorisationError(
                f"{self.rule.name}: the moments cannot be factored at any strength that a search tries; collect the "
                "profile from more safety data, or use Scale()"
            )
        passing = self._walked(passing)
        return ("strictest fails", self.grid[self.strictest]) if passing is None else ("found", self.grid[passing])

    def passes(self, place: int) -> bool:
        if place not in self.found:
            strength = self.grid[place]
            drift = self.measure(strength)
            bound = drift.probability_lost_at_most(self.auto.confidence)
            self.found[place] = Trial(
                strength=strength,
                lost=drift.lost,
                probability_lost=drift.probability_lost,
                probability_lost_bound=bound,
                passed=drift.lost <= self.allowed and bound <= self.auto.share,  # NaN passes nothing
            )
            self.tell(self.found[place])
        return self.found[place].passed

    def _halved(self, failing: int) -> int | None:
        """Find the mildest place that passes, where no stricter one fails.

        Args:
            failing: The place after the last.

        Returns:
            The place; None if none passes.
        """
        last, passing = failing, None
        stride = max(1, round(math.log(STEP) / math.log(self.auto.precision)))
        place = min(range(last), key=lambda one: abs(math.log(self.grid[one] / START)))
        while True:
            if not self._is_solvable(place):
                self.strictest = place + 1
            elif self.passes(place):
                passing = place
            else:
                failing = place
            stricter = self.strictest - 1 if passing is None else passing
            if failing - stricter <= 1:
                return passing
            place = (stricter + failing) // 2
            if failing == last:
                place = stricter + stride
            elif stricter < 0:
                place = failing - stride
            place = min(max(place, stricter + 1), failing - 1)

    def _is_solvable(self, place: int) -> bool:
        try:
            self.passes(place)
        except FactorisationError as error:
            warn(f"{self.rule.name}: the search stays milder than strength {self.grid[place]:g} ({error})")
            return False
        return True

    def _walked(self, passing: int | None) -> int | None:
        # All that were tried on the stricter side have passed; what lies between them is tried too, where it may not.
        while passing is not None and (untried := self._in_question(passing)):
            place = untried[0]
            if not self._is_solvable(place):
                self.strictest = place + 1
            elif not self.passes(place):
                passing = place - 1 if place > self.strictest else None
        return passing

    def _in_question(self, passing: int) -> list[int]:
        """What was skipped, from where losses are seen to fall as strengths get milder.

        Args:
            passing: The mildest place that passed.

        Returns:
            Stricter places, from the strictest on.
        """
        tried = sorted(place for place in self.found if place <= passing)
        falls = (one for one, other in itertools.pairwise(tried) if self.found[one].lost > self.found[other].lost)
        first = next(falls, None)
        if first is None:
            return []
        begin = max((place for place in tried if place < first), default=self.strictest - 1)
        return [place for place in range(begin + 1, passing) if place not in self.found]
