"""Two models that answered the same prompts: how much they differ, and whether by more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Final

from safedelta_hf.core.binomial import at_most
from safedelta_hf.evaluation.result import CONFIDENCE, average, normal_deviate

DRAWS: Final = 10_000
"""Random signs of a permutation test: p-values are multiples of 1/10,001."""

_AT_ONCE: Final = 100
_ROUNDING: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How two models differ in one score.

    Attributes:
        score: The score.
        name: One model.
        against: The other.
        value: The score of the one, less that of the other.
        low: Lower end of its 95 % interval; None without values prompt by prompt.
        high: Upper end.
        p_value: How often models that do not differ would differ at least so much; None likewise.
        test: Which test says so: "exact McNemar" or "permutation of signs"; empty likewise.
        count: Prompts with a value of both.
        more: Of values that are yes or no, how many only the one has; else None.
        fewer: How many only the other has.
    """

    score: str
    name: str
    against: str
    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    test: str = ""
    count: int = 0
    more: int | None = None
    fewer: int | None = None


def paired(
    score: str, name: str, against: str, values: Sequence[float | None], others: Sequence[float | None], unit: str
) -> Difference:
    """Compare two models prompt by prompt.

    Where every value is yes or no: the exact test of McNemar (1947), which asks whether the prompts on which the models
    part are split evenly, and the adjusted Wald interval of Bonett and Price (2012). Else a permutation test, in which
    the difference on each prompt may have either sign (its p-value after Phipson and Smyth, 2010, is never 0), and the
    normal approximation of the mean difference.

    Args:
        score: What the values are of.
        name: One model.
        against: The other.
        values: The values of the one, prompt by prompt.
        others: The values of the other, for the same prompts.
        unit: Their unit.

    Returns:
        The difference; of prompts on which both have a value.
    """
    both = [(one, other) for one, other in zip(values, others, strict=True) if one is not None and other is not None]
    if not both:
        return Difference(score=score, name=name, against=against, value=0.0)
    if all(value in (0, 1) for pair in both for value in pair):
        return _yes_or_no(score, name, against, both)
    differences = [one - other for one, other in both]
    mean = average(differences, unit)
    return Difference(
        score=score,
        name=name,
        against=against,
        value=mean.value,
        low=mean.low,
        high=mean.high,
        p_value=_permuted(differences),
        test="permutation of signs",
        count=len(both),
    )


def _yes_or_no(score: str, name: str, against: str, both: Sequence[tuple[float, float]]) -> Difference:
    count = len(both)
    more = sum(one > other for one, other in both)
    fewer = sum(one < other for one, other in both)
    # Bonett and Price: one prompt more of either kind.
    upwards, downwards = (more + 1) / (count + 2), (fewer + 1) / (count + 2)
    spread = normal_deviate(CONFIDENCE) * sqrt((upwards + downwards - (upwards - downwards) ** 2) / (count + 2))
    centre, value = upwards - downwards, (more - fewer) / count
    return Difference(
        score=score,
        name=name,
        against=against,
        value=value,
        low=max(min(centre - spread, value), -1.0),
        high=min(max(centre + spread, value), 1.0),
        p_value=min(2 * at_most(min(more, fewer), more + fewer, 0.5), 1.0),
        test="exact McNemar",
        count=count,
        more=more,
        fewer=fewer,
    )


def _permuted(differences: Sequence[float]) -> float:
    import torch  # takes seconds, and where all answers are yes or no nothing is drawn

    values_n = torch.tensor(differences, dtype=torch.float64)
    found = abs(values_n.sum()) - _ROUNDING * values_n.abs().sum()
    generator = torch.Generator().manual_seed(0)
    as_far = 0
    for _ in range(DRAWS // _AT_ONCE):
        signs_dn = torch.randint(0, 2, (_AT_ONCE, len(differences)), generator=generator, dtype=torch.float64) * 2 - 1
        as_far += int((abs(signs_dn @ values_n) >= found).sum())
    return (as_far + 1) / (DRAWS + 1)
