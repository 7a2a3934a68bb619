"""Slow, obvious float64 versions of the merges: entry by entry, angle by angle."""

import math

import torch
from torch import Tensor


def vector(tensor: Tensor) -> list[float]:
    return tensor.double().flatten().tolist()


def cosine(one: Tensor, other: Tensor) -> float:
    a, b = vector(one), vector(other)
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def slerp(base: Tensor, tuned: Tensor, share: float) -> Tensor:
    """mergekit's convention: the angle of the directions, the weights themselves on the arc."""
    base, tuned = base.double(), tuned.double()
    angle = math.acos(cosine(base, tuned))
    return math.sin((1 - share) * angle) / math.sin(angle) * base + math.sin(share * angle) / math.sin(angle) * tuned


def ties(deltas: list[Tensor], density: float) -> Tensor:
    """Trim, elect and average as the paper lists them, one entry after another; ties in magnitude are all kept."""
    columns = [vector(delta) for delta in deltas]
    trimmed = []
    for column in columns:
        kept = int(density * len(column))
        ranked = sorted((abs(value) for value in column), reverse=True)
        least = ranked[kept - 1] if kept else math.inf
        trimmed.append([value if abs(value) >= least else 0.0 for value in column])
    merged = []
    for values in zip(*trimmed, strict=True):
        total = sum(values)
        agreeing = [value for value in values if value * total > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).reshape(deltas[0].shape)


def published_stock_ratio(deltas: list[Tensor]) -> float:
    """Model Stock's ratio of `N` models from the mean cosine of all pairs."""
    count = len(deltas)
    pairs = [cosine(deltas[i], deltas[j]) for i in range(count) for j in range(i)]
    mean = sum(pairs) / len(pairs)
    return count * mean / (1 + (count - 1) * mean)


def alignment_cosine(delta: Tensor, alignment: Tensor) -> float:
    delta, alignment = delta.double(), alignment.double()
    projection = alignment @ alignment.T / torch.linalg.norm(alignment)
    return cosine(delta, projection @ delta)
