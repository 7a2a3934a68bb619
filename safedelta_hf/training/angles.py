"""Angles between the hidden states of queries, layer by layer: where a model begins to tell malicious ones apart.

After Li et al., "Safety Layers in Aligned Large Language Models" (arXiv 2408.17003, ICLR 2025), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from safedelta_hf.errors import DataError

PERMUTATIONS: Final = 100
"""How often the labels of the queries are exchanged to learn how large a gap is by chance."""

RISE: Final = 0.25
"""Share of the steepest rise of the gap by which its rise begins and ends. The paper reads both off a figure."""


@dataclass(frozen=True, kw_only=True)
class AngleCurves:
    """How the last hidden states of queries lie to one another, one value for each layer (section 3.2, figure 2).

    Attributes:
        normal: Mean cosine between two normal queries.
        normal_spread: Its standard deviation over pairs.
        malicious: Mean cosine between a normal and a malicious query.
        malicious_spread: Its standard deviation over pairs.
        gap: Mean angle between a normal and a malicious query minus that between two normal ones, in radians.
        chance: The largest gap over layers that 99 % of random exchanges of the labels stay below.
    """

    normal: tuple[float, ...]
    normal_spread: tuple[float, ...]
    malicious: tuple[float, ...]
    malicious_spread: tuple[float, ...]
    gap: tuple[float, ...]
    chance: float


def angle_curves(normal: Tensor, malicious: Tensor, *, pairs: int = 500, seed: int = 0) -> AngleCurves:
    """Cosines and angle gap of random pairs of queries, layer by layer (section 3.2).

    Args:
        normal: Last hidden states of normal queries, [queries, layers, hidden].
        malicious: Of malicious queries, [queries, layers, hidden].
        pairs: Pairs of each kind; a normal query of one pair is that of the other.
        seed: Seed of the draws.

    Returns:
        The curves.

    Raises:
        DataError: There are fewer than two normal queries, or no malicious one.
    """
    count, others = len(normal), len(malicious)
    if count < 2 or others < 1:
        raise DataError(
            f"safety layers: got {count} normal and {others} malicious queries; at least 2 and 1 are needed"
        )
    units = nn.functional.normalize(torch.cat((normal, malicious)).double(), dim=-1).transpose(0, 1)
    cosines_lqq = (units @ units.mT).clamp(-1, 1)
    angles_lqq = cosines_lqq.arccos()
    draw = torch.Generator().manual_seed(seed)
    one = torch.randint(count, (pairs,), generator=draw)
    two = (one + torch.randint(1, count, (pairs,), generator=draw)) % count
    three = count + torch.randint(others, (pairs,), generator=draw)

    def gap(order: Tensor) -> Tensor:
        return (angles_lqq[:, order[one], order[three]] - angles_lqq[:, order[one], order[two]]).mean(1)

    by_chance = torch.stack([gap(torch.randperm(count + others, generator=draw)).max() for _ in range(PERMUTATIONS)])
    normals, mixed = cosines_lqq[:, one, two], cosines_lqq[:, one, three]
    return AngleCurves(
        normal=tuple(normals.mean(1).tolist()),
        normal_spread=tuple(normals.std(1, correction=0).tolist()),
        malicious=tuple(mixed.mean(1).tolist()),
        malicious_spread=tuple(mixed.std(1, correction=0).tolist()),
        gap=tuple(gap(torch.arange(count + others)).tolist()),
        chance=float(by_chance.quantile(0.99)),
    )


def initial_range(gap: Sequence[float], *, least: float) -> tuple[int, int] | None:
    """Where the gap appears and first levels off: the steep part of its first rise.

    Args:
        gap: Angle gap of each layer, in radians; before the first it is 0, because all queries end in one token.
        least: Below this there is no gap.

    Returns:
        First and last layer of the rise; None without a gap.
    """
    if max(gap) <= least:
        return None
    before = (0.0, *gap[:-1])
    rises = [now - then for then, now in zip(before, gap, strict=True)]
    steep = [rise > RISE * max(rises) for rise in rises]
    lasts = [then < following for then, following in zip(before, (*gap[1:], gap[-1]), strict=True)]  # no blip
    first = next((k for k in range(len(gap)) if steep[k] and lasts[k]), rises.index(max(rises)))
    last = first
    while last + 1 < len(gap) and steep[last + 1]:
        last += 1
    return first, last
