"""Model Stock: the mean of several fine-tuned models, drawn to the base where they disagree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from safedelta_hf.core.merging import mean_cosine, stock_ratio
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.merge import Merged, MergeInput, MergeRule, Source, require_others
from safedelta_hf.rules.rule import number


@dataclass(frozen=True, kw_only=True)
class ModelStock(MergeRule):
    """Keep of the mean delta of `N` models the share `1 / (1 + strength (1 - c) / (N c))`, with `c` their mean cosine.

    Strength 1 is the published ratio `N c / (1 + (N - 1) c)` (arXiv 2403.19522), for each parameter by itself. What
    training happened to do once is noise to it, what every run did is not; if every run lost its refusals, so does the
    result.

    Args:
        strength: 0 returns the mean of the models, 1 is as published, larger values approach the base. "auto" measures.
        others: Further models, fine-tuned from the same base, at least one; folders of models or LoRAs, models, or
            readers.

    Raises:
        ConfigurationError: The strength is no number at least 0, or there is no other model.
    """

    others: Sequence[Source] = ()

    name: ClassVar[str] = "model_stock"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e4)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = (
            "it needs at least one more model, fine-tuned from the same base: ModelStock(others=['folder', ...]) in "
            "Python; the command line cannot name one"
        )
        object.__setattr__(self, "others", require_others("ModelStock", self.others, needs))
        if not self.others:
            raise ConfigurationError(f"ModelStock: others=(); {needs}")

    @property
    @override
    def sources(self) -> tuple[Source, ...]:
        return tuple(self.others)

    @override
    def merged(self, parameter: MergeInput) -> Merged:
        deltas = [parameter.delta, *parameter.others]
        alike = mean_cosine(deltas)
        ratio = stock_ratio(alike, len(deltas), number(self.strength))
        mean = torch.stack(deltas).mean(0)
        return Merged(ratio * mean, (f"mean cosine of {len(deltas)} deltas {alike:.3f}, ratio {ratio:.3f}",))
