"""How hard a rule acts: a number, or whatever measured refusals allow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from safedelta_hf.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class AutoStrength:
    """The mildest strength at which the model, as measured, still refuses.

    Refusals that were held out of the profile's moments are read by the adjusted model. Their negative log-likelihood
    may rise above that under the base model by no more than the tolerance, on the mean over examples and on an upper
    quantile.

    Args:
        tolerance: Allowed rise in nats per response token, positive.
        quantile: Which quantile over examples has to stay within it besides the mean, in (0, 1).
        precision: Ratio of two neighbouring strengths at which the search stops, above 1.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    tolerance: float = 0.01
    quantile: float = 0.95
    precision: float = 1.3

    def __post_init__(self) -> None:
        owner = type(self).__name__
        require_number(owner, "tolerance", self.tolerance, "positive and finite", lambda v: 0 < v < math.inf)
        require_number(owner, "quantile", self.quantile, "between 0 and 1", lambda v: 0 < v < 1)
        require_number(owner, "precision", self.precision, "above 1 and finite", lambda v: 1 < v < math.inf)


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
    is_number = isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if not is_number or not accepts(value):
        raise ConfigurationError(f"{owner}: {field}={value!r} must be a number {allowed}")


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
