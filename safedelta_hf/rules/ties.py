"""TIES: trim small entries, elect signs, and average what agrees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from safedelta_hf.core.merging import elect, trim
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule, Source, require_others


@dataclass(frozen=True, kw_only=True)
class Ties(MergeRule):
    """Keep the largest entries; of several models, the mean of those that agree in sign (arXiv 2306.01708).

    The share of entries that is kept, in each parameter, is `1 / (1 + strength)`. With other models, strength 0 gives
    the mean of what agrees, untrimmed, in place of the fine-tuned weights.

    Args:
        strength: 0 trims nothing, 4 is the published density of 0.2. "auto" measures.
        others: Further models, fine-tuned from the same base; folders of models or LoRAs, models, or readers.

    Raises:
        ConfigurationError: The strength is no number at least 0, or one of the others is no model.
    """

    others: Sequence[Source] = ()

    name: ClassVar[str] = "ties"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e3)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "others", require_others("Ties", self.others, "pass others=[...], or leave it out"))

    @property
    @override
    def sources(self) -> tuple[Source, ...]:
        return tuple(self.others)

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        return Merged(elect([trim(delta, self._share) for delta in (parameter.delta, *parameter.others)]))
