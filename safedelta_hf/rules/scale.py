"""Scale: linear merging with the base, the baseline that knows nothing of the safety data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from safedelta_hf.core.transform import Dense, Transform
from safedelta_hf.rules.rule import LayerMoments, Shrinking, number


@dataclass(frozen=True, kw_only=True)
class Scale(Shrinking):
    """Keep the same share of every delta: `D* = D / (1 + lam)`, which is `Ridge` with `H = I`.

    Linear merging of base and fine-tuned model (Farn et al. 2024, arXiv 2412.19512).

    Args:
        strength: `lam`; 0 returns the fine-tuned weights, 1 the mean of both models. "auto" measures.

    Raises:
        ConfigurationError: The strength is no number at least 0.
    """

    name: ClassVar[str] = "scale"
    search_range: ClassVar[tuple[float, float]] = (1e-2, 1e2)
    reads_moments: ClassVar[bool] = False

    @override
    def factorise(self, moments: LayerMoments) -> Transform:
        share = 1 / (1 + number(self.strength))
        safety = moments.safety
        return Dense(matrix=torch.full((len(safety),), share, device=safety.device))
