"""How hard a rule acts: a number, or whatever measured refusals allow."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self

from typing_extensions import override

from safedelta_hf.core.binomial import examples_needed, most_allowed
from safedelta_hf.core.low_rank import Matrix
from safedelta_hf.core.transform import DeltaMatrix, Transform
from safedelta_hf.errors import ConfigurationError, is_number, shown

SHARE_LOST: Final = 0.05
"""Share of refusals that may be lost, where nobody says another."""


@dataclass(frozen=True, kw_only=True)
class AutoStrength:
    """The mildest strength at which the model, as measured, still refuses.

    Refusals that were held out of the profile's moments are read by the adjusted model. One is lost where the base
    surely begins it, under greedy decoding, and the adjusted model no longer does. As few may be lost as show, with the
    confidence, that no larger share of all such refusals is: an exact binomial bound. Nor may the
    beginnings of refusals lose a larger share of their probability, on the mean: the upper end of a one-sided interval
    about it, with the same confidence, counts.

    Args:
        lost: Share of refusals that may be lost, in (0, 1). None for 5 %, or, if the held-out refusals are too few to
            show that, for the least that they can show.
        confidence: How often such a statement holds, at least, in (0, 1).
        precision: Ratio of two neighbouring strengths that the search tells apart, above 1.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    lost: float | None = None
    confidence: float = 0.95
    precision: float = 1.5

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.lost is not None:
            require_number(owner, "lost", self.lost, "between 0 and 1, or None", lambda v: 0 < v < 1)
        require_number(owner, "confidence", self.confidence, "between 0 and 1", lambda v: 0 < v < 1)
        require_number(owner, "precision", self.precision, "above 1 and finite", lambda v: 1 < v < math.inf)

    @property
    def share(self) -> float:
        """The share of refusals that may be lost, if there are enough to show it."""
        return SHARE_LOST if self.lost is None else self.lost

    def allowed(self, refusals: int) -> int | None:
        """How many of the held-out refusals may be lost.

        Args:
            refusals: Number of them.

        Returns:
            The number; None if not even none shows that no larger share is lost.
        """
        return most_allowed(refusals, self.share, self.confidence)

    def needed(self, lost: int = 0) -> int:
        """How many held-out refusals show that no larger share is lost.

        Args:
            lost: How many of them are.

        Returns:
            The number.
        """
        return examples_needed(lost, self.share, self.confidence)


Strength = float | Literal["auto"] | AutoStrength


def require_number(owner: str, field: str, value: object, allowed: str, accepts: Callable[[Any], bool]) -> None:
    """Stop at a setting that is no number, or not one of those allowed.

    Args:
        owner: What has the setting.
        field: Its name.
        value: Its value.
        allowed: The allowed numbers, in words.
        accepts: Whether a number is one of them.

    Raises:
        ConfigurationError: It is not.
    """
    if not is_number(value) or not accepts(value):
        raise ConfigurationError(f"{owner}: {field}={shown(value)} must be a number {allowed}")


def number(strength: Strength) -> float:
    """A strength that is known to be a number by now.

    Args:
        strength: Of a rule.

    Returns:
        The number.

    Raises:
        ConfigurationError: It still has to be found by a search.
    """
    if isinstance(strength, AutoStrength | str):
        raise ConfigurationError("strength='auto' is found by measuring a model; this rule was applied without one")
    return strength


@dataclass(frozen=True, kw_only=True)
class LayerMoments:
    """What a rule may know of a layer's inputs: Hessians `(2/N) X^T X` [in, in] or their diagonals [in], float32.

    Of few tokens they are of low rank, and `core.low_rank.dense` makes the matrix where a rule needs it.

    Attributes:
        safety: On the safety data, `H`, not damped.
        task: On the task data, `G`; None unless the rule needs it.
    """

    safety: Matrix
    task: Matrix | None = None


Factors = Any
"""What a rule makes of a layer's moments; read by that rule alone."""


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """Decides which part of a delta is kept.

    A rule is a frozen dataclass whose fields are its settings.

    Args:
        strength: How hard the rule acts, in its own units; "auto", for `AutoStrength()`, measures.
    """

    strength: Strength = "auto"

    name: ClassVar[str]
    """Registered name, as in reports and on the command line."""
    mildest: ClassVar[float]
    """Strength that keeps the whole delta."""
    search_range: ClassVar[tuple[float, float]]
    """Mildest and strictest strength that a search tries."""
    needs_task: ClassVar[bool] = False
    """Whether it weighs what the task data uses."""
    reads_moments: ClassVar[bool] = True
    """Whether what it keeps depends on the safety data's moments at all; one that reads none is given zeros."""
    factors_serve_any_strength: ClassVar[bool] = False
    """Whether what `factorise` returns holds for every strength."""
    needs_dense: ClassVar[bool] = False
    """Whether it needs base and fine-tuned weight whole, and may give a delta of any rank."""

    def __post_init__(self) -> None:
        if isinstance(self.strength, str) and self.strength == "auto":
            object.__setattr__(self, "strength", AutoStrength())
        if self.auto is None:
            self._check_strength()

    @property
    def settings(self) -> dict[str, Any]:
        """The fields, as plain values."""
        return asdict(self)

    @property
    def auto(self) -> AutoStrength | None:
        """How to find the strength, if it is not a number."""
        return self.strength if isinstance(self.strength, AutoStrength) else None

    @property
    def needs_safety_data(self) -> bool:
        """Whether it takes safety data, or a profile of them: for their moments, or to measure its strength."""
        return self.reads_moments or self.auto is not None

    def at(self, strength: float) -> Self:
        """The same rule at another strength.

        Args:
            strength: The strength.

        Returns:
            A new rule.
        """
        return replace(self, strength=strength)

    def without_task(self) -> "Rule":
        """What is used in its place where there is no task to weigh.

        Returns:
            The rule itself, if it weighs none.
        """
        return self

    def _check_strength(self) -> None:
        self._require("strength", "at least 0 and finite, or 'auto'", lambda value: 0 <= value < math.inf)

    def _require(self, field: str, allowed: str, accepts: Callable[[Any], bool]) -> None:
        require_number(type(self).__name__, field, getattr(self, field), allowed, accepts)


class TransformRule(Rule):
    """Turns the moments of a layer into a transform of its delta, wherever and in whatever form that is stored.

    `factorise` does what depends on the moments alone, so that layers with the same inputs share it; what it returns is
    passed back to `transform` unread.
    """

    @abstractmethod
    def factorise(self, moments: LayerMoments) -> Factors:
        """Factor the moments of a layer.

        Args:
            moments: Of the layer.

        Returns:
            What the rule will need of them.
        """

    @abstractmethod
    def transform(self, factors: Factors, delta: DeltaMatrix) -> Transform:
        """Turn the factors and the statistics of one delta into its transform.

        Args:
            factors: What `factorise` returned for the layer.
            delta: Statistics of the layer's delta.

        Returns:
            The transform, with a note of numerical trouble in factorising too.
        """


class Shrinking(TransformRule):
    """A rule whose factors are the transform, whatever the delta; strength 0 keeps the whole delta."""

    mildest: ClassVar[float] = 0.0

    @abstractmethod
    @override
    def factorise(self, moments: LayerMoments) -> Transform: ...

    @override
    def transform(self, factors: Transform, delta: DeltaMatrix) -> Transform:
        return factors
