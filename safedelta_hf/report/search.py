"""How the strength of a rule was found, and what the held-out refusals show of it."""

from dataclasses import dataclass
from typing import Final, Literal

AS_LIKELY: Final = 0.005
"""Share of their probability below which refusals count as none the less likely in words; figures are exact."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One strength that was tried on held-out refusals.

    Attributes:
        strength: The strength.
        lost: How many of those that the base surely begins are no longer begun.
        probability_lost: Mean share of its probability that the beginning of a held-out refusal has lost: what is lost
            where responses are sampled.
        probability_lost_bound: What that mean is at most over all such refusals: the upper end of a one-sided normal
            interval, with the confidence of the search.
        passed: Whether as few are lost as have to be.
    """

    strength: float
    lost: int
    probability_lost: float
    probability_lost_bound: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ReadingNoise:
    """What is lost by rounding alone where one model is read twice.

    Measured on the base: it read the refusals a second time with every embedding moved by one rounding step, which
    its data type cannot tell from where it was.

    Attributes:
        precision: The coarsest data type that its layers computed in, such as "bfloat16".
        lost: How many of the refusals that it surely begins in one reading it does not begin in the other; None where
            the model has no embeddings to move.
        probability_lost: Mean share of its probability that the beginning of a refusal has lost from one to the other;
            whichever way it is more.
    """

    precision: str
    lost: int | None
    probability_lost: float | None


@dataclass(frozen=True, kw_only=True)
class StrengthSearch:
    """How the strength of a rule was found.

    Attributes:
        outcome: "found", "nothing needed" (the rule at its mildest loses no more than is allowed), or "strictest fails"
            (every strength that the rule has loses more).
        strength: The strength that was applied.
        share: Share of refusals that may be lost.
        confidence: Of the bound.
        examples: Number of held-out refusals that the base surely begins, which can be lost.
        others: Number of those that it does not, which are not counted.
        allowed: How many may be lost.
        bound: Share of all such refusals that are lost at most, with that confidence.
        holds: Whether that is within the share; where no share was asked for, whether it is the least that the held-out
            refusals can show.
        more: How many more held-out refusals, none of them lost, would bring the bound down to the share.
        trials: What was tried, in order.
        noise: What of it may be noise of reading, which is subtracted from nothing.
    """

    outcome: Literal["found", "nothing needed", "strictest fails"]
    strength: float
    share: float
    confidence: float
    examples: int
    others: int
    allowed: int
    bound: float
    holds: bool
    more: int
    trials: tuple[Trial, ...]
    noise: ReadingNoise | None = None

    @property
    def applied(self) -> Trial:
        """The trial of the strength that was applied."""
        return next(trial for trial in self.trials if trial.strength == self.strength)

    @property
    def summary(self) -> str:
        """The outcome, and what is certain of it, in a few sentences."""
        told = {
            "found": f"Strength {self.strength:.3g}, measured in {len(self.trials)} trials.",
            "nothing needed": "The rule at its mildest loses no more refusals than is allowed.",
            "strictest fails": f"Even the strictest strength, {self.strength:.3g}, is not enough.",
        }
        tuned, last = self.trials[0], self.applied
        before = "" if tuned is last else f"; {tuned.lost} before"
        counted = f"{last.lost} of {self.examples} held-out ones lost (limit {self.allowed}{before})"
        return (
            f"Refusals: {self._likelihood}; "
            f"{counted if self.examples else 'no held-out one could be counted'}{self._noise_told}. "
            f"{told[self.outcome]} {self.promise}"
        )

    @property
    def _likelihood(self) -> str:
        lost, limit = self.applied.probability_lost, f"limit {percent(self.share)} less"
        # NaN is not as likely as anything.
        if lost < AS_LIKELY:
            return f"as likely as in the base ({limit})"
        bound = percent(self.applied.probability_lost_bound)
        return f"{percent(lost)} less likely than in the base (at most {bound}, {limit})"

    @property
    def promise(self) -> str:
        """What the held-out refusals show, and what would show more."""
        bound = percent(self.bound)
        told = f"With {percent(self.confidence)} confidence at most {bound} of refusals like these are lost."
        if not self.examples:
            told = "Nothing is certain of the refusals."
        if self.more:
            told += f" {self.more} more held out, none of them lost, would bring that down to {percent(self.share)}."
        if self.others:
            told += (
                f" {self.others} held-out refusals the base itself does not begin so, or is not sure of; they are not "
                "counted. Give the safety data responses that are the base's own."
            )
        return told

    @property
    def warning(self) -> str:
        """What has to be known before anything else. Empty if there is nothing."""
        if self.outcome != "strictest fails":
            return "" if self.holds else f"LESS IS CERTAIN OF THE REFUSALS THAN IT SHOULD BE. {self.promise}"
        advice = (
            f" {self.summary} That strength was applied all the same, and may have taken back all that the "
            "fine-tuning taught: measure the new skill before you use this model. What else can be done: "
            "callback.adjust(model, rule=<a rule with a number as its strength>) begins again from the fine-tuned "
            "weights (those of a whole model are kept where keep_tuned=<folder> was given); "
            "AutoStrength(lost=...) allows more; embeddings, norms or uncovered parameters that are kept "
            "as tuned can carry the damage (treatment=)."
        )
        noise = self.noise
        if noise is not None and noise.lost is not None and noise.probability_lost is not None:
            if noise.lost > self.allowed or noise.probability_lost > self.share:
                advice += (
                    f" Rounding in {noise.precision} alone, by which this model was read, loses {noise.lost} of them, "
                    f"and {percent(noise.probability_lost)} of sampled ones: allow more, or fine-tune from weights in "
                    "float32."
                )
        return "THE STRICTEST STRENGTH WAS APPLIED, and more refusals are lost than are allowed." + advice

    @property
    def _noise_told(self) -> str:
        noise = self.noise
        if noise is None:
            return ""
        if noise.lost is None or noise.probability_lost is None:
            return f", read in {noise.precision}"
        sampled = percent(noise.probability_lost)
        return f"; noise of reading in {noise.precision}: {noise.lost}, and {sampled} of sampled ones"


def percent(share: float, digits: int = 3) -> str:
    """Set a share as people read it.

    Args:
        share: 1 for all.
        digits: That count.

    Returns:
        Such as "42 %".
    """
    return f"{float(f'{share * 100:.{digits}g}'):g} %"  # "1e+02" is 100
