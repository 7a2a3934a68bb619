"""What an evaluation found: named scores with their counts and intervals, and what they were measured on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path
from statistics import NormalDist, stdev
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from safedelta_hf.errors import DataError
from safedelta_hf.folders import read_saved, write_whole
from safedelta_hf.report.printing import SCORE, Foldable, printed

RESULTS: Final = "results.json"
"""The file that an evaluation is saved as."""

HARNESS: Final = "lm_eval/"
"""How the names of scores begin that lm_eval gives."""

CONFIDENCE: Final = 0.95
"""Coverage of every interval."""


def normal_deviate(confidence: float) -> float:
    """How many standard errors a two-sided interval reaches to each side.

    Args:
        confidence: Its coverage.

    Returns:
        1.96 for 95 %.
    """
    return NormalDist().inv_cdf((1 + confidence) / 2)


_Z: Final = normal_deviate(CONFIDENCE)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure.

    Attributes:
        value: The figure.
        count: Number of examples behind it.
        low: Lower end of its 95 % interval; None where there is none.
        high: Upper end.
        unit: "share" (from 0 to 1), "nats/token", or the name of another unit.
    """

    value: float
    count: int
    low: float | None = None
    high: float | None = None
    unit: str = "share"


def share(values: Sequence[float]) -> Score:
    """The mean of values from 0 to 1, with Wilson's interval.

    For yes or no this is the interval of Wilson (1927). For values in between it is too wide, as no distribution on
    [0, 1] with the same mean varies more than yes or no.

    Args:
        values: One value per example.

    Returns:
        The share.

    Raises:
        DataError: There are no values, or one lies outside [0, 1].
    """
    outside = [value for value in values if not 0 <= value <= 1]
    if not values or outside:
        raise DataError(f"a share needs at least one value and all of them from 0 to 1, got {outside[:3] or 'none'}")
    return share_of(sum(values) / len(values), len(values))


def share_of(mean: float, count: int) -> Score:
    """A share with Wilson's interval.

    Args:
        mean: The share, from 0 to 1.
        count: Number of examples behind it.

    Returns:
        The share with its interval.
    """
    centre = mean + _Z**2 / (2 * count)
    spread = _Z * sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    # Rounding must not put the value itself outside, where it is 0 or 1.
    low, high = min((centre - spread) / scale, mean), max((centre + spread) / scale, mean)
    return Score(value=mean, count=count, low=max(low, 0.0), high=min(high, 1.0))


def average(values: Sequence[float], unit: str) -> Score:
    """The mean of any values, with the interval of the normal approximation.

    Args:
        values: One value per example, at least one.
        unit: Their unit.

    Returns:
        The mean; without an interval where there is one value alone.
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Score(value=mean, count=len(values), unit=unit)
    spread = _Z * stdev(values) / sqrt(len(values))
    return Score(value=mean, count=len(values), low=mean - spread, high=mean + spread, unit=unit)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How one model behaves.

    Attributes:
        model: Fingerprint of weights, adapters, configuration and tokenizer.
        scores: Scores by name; docs/evaluation.md says what each means.
        prompts: SHA-256 of the prompts of each part.
        settings: How the responses were generated and judged.
        values: What each score is the mean of, one value for each prompt in their order, None where there is none
            (no verdict of a judge). Scores that are no such mean have none, nor has what older versions saved.
    """

    model: str
    scores: Mapping[str, Score]
    prompts: Mapping[str, str]
    settings: Mapping[str, Any]
    values: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The figures alone.

        Args:
            prefix: What every name begins with.

        Returns:
            Values by name.
        """
        return {f"{prefix}{name}": score.value for name, score in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        """The whole evaluation as plain values.

        Returns:
            A dictionary that JSON can hold.
        """
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, whole or not at all.

        Args:
            path: File to write; one that is there is replaced.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The evaluation.

        Raises:
            DataError: The file is missing, or is not an evaluation.
        """

        def made(content: dict[str, Any]) -> "Evaluation":
            scores = {name: Score(**score) for name, score in content.pop("scores").items()}
            values = {name: tuple(own) for name, own in content.pop("values", {}).items()}
            return cls(scores=scores, values=values, **content)

        return read_saved(path, "evaluation", made)

    def table(self) -> str:
        """The scores as a table for a terminal.

        Returns:
            Text with one row for each score.
        """
        heads = ("score", "value", "95 % interval", "unit", "examples")
        rows = Table(*heads, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name, score in self.scores.items():
            has_interval = score.low is not None and score.high is not None
            interval = f"{shown(score, score.low)} to {shown(score, score.high)}" if has_interval else ""
            rows.add_row(Foldable(name, SCORE), shown(score, score.value), interval, score.unit, str(score.count))
        return printed(rows)

    def __str__(self) -> str:
        return self.table()


def shown(score: Score, value: float | None) -> str:
    """A figure as text.

    Args:
        score: What it belongs to.
        value: The score's value, or an end of its interval.

    Returns:
        Such as "12.0%"; nothing of None.
    """
    return "" if value is None else f"{value:.1%}" if score.unit == "share" else f"{value:.4g}"
