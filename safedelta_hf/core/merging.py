"""Merging of weights and deltas, entry by entry or as whole vectors: no matrix multiplies a delta from the right.

Every function returns what is kept of a delta, `D*`, in the shape and dtype of what it was given.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

COLLINEAR = 0.9995
"""Cosine beyond which two weights count as one direction and are interpolated linearly, as mergekit does."""


def cosine(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> float:
    """Cosine of the angle between two tensors, each taken as one vector.

    Args:
        one: Any shape.
        other: The same shape.

    Returns:
        In [-1, 1], summed in float64; 0 where one of them is zero.
    """
    length = math.sqrt(_inner(one, one) * _inner(other, other))
    return max(-1.0, min(1.0, _inner(one, other) / length)) if length else 0.0


def slerp(base: Float[Tensor, "*shape"], delta: Float[Tensor, "*shape"], share: float) -> Float[Tensor, "*shape"]:
    """Move along the arc from the base to the fine-tuned weight (Shoemake 1985; norms as in mergekit).

    The angle is that of the directions, the interpolated vectors are the weights themselves:
    `W = sin((1 - t) a) / sin(a) W0 + sin(t a) / sin(a) W1`.

    Args:
        base: `W0`.
        delta: `D = W1 - W0`.
        share: `t` in [0, 1]; 1 is the fine-tuned weight.

    Returns:
        `W - W0`. Where both weights point the same or the opposite way, or one of them is zero, `t D`.
    """
    tuned = base + delta
    alike = cosine(base, tuned)
    if abs(alike) > COLLINEAR or not base.any() or not tuned.any():
        return share * delta
    angle = math.acos(alike)
    of_base = math.sin((1 - share) * angle) / math.sin(angle)
    of_tuned = math.sin(share * angle) / math.sin(angle)
    return (of_base + of_tuned - 1) * base + of_tuned * delta


def random_entries(shape: Sequence[int], share: float, seed: int) -> Bool[Tensor, "..."]:
    """Choose entries independently of one another.

    Args:
        shape: Of the tensor.
        share: Probability of each entry, in [0, 1].
        seed: The choice for a larger share holds every entry of that for a smaller one under the same seed.

    Returns:
        True where chosen; in host memory, and the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator) < share


def drop(
    delta: Float[Tensor, "*shape"], kept: Bool[Tensor, "*shape"], share: float, *, rescale: bool
) -> Float[Tensor, "*shape"]:
    """Keep chosen entries (DARE, arXiv 2311.03099, section 3).

    Args:
        delta: `D`.
        kept: The entries.
        share: The probability with which each was chosen, positive.
        rescale: Whether to divide by it, so that the expectation is `D`.

    Returns:
        `D*`.
    """
    return torch.where(kept, delta / share if rescale else delta, 0.0)


def trim(delta: Float[Tensor, "*shape"], density: float) -> Float[Tensor, "*shape"]:
    """Keep the entries of largest magnitude (TIES, arXiv 2306.01708, step 1).

    Args:
        delta: `D`.
        density: Share to keep, in [0, 1]; rounded down to whole entries, but at least one unless it is 0. Of entries
            of one magnitude the first ones are kept, so that the number holds and is the same on every machine.

    Returns:
        `D` with zeros elsewhere.
    """
    count = max(int(density * delta.numel()), 1 if density > 0 else 0)
    if count >= delta.numel():
        return delta.clone()
    if count == 0:
        return torch.zeros_like(delta)
    return torch.where(largest_entries(delta.abs(), count), delta, 0.0)


def largest_entries(values: Float[Tensor, "*shape"], count: int) -> Bool[Tensor, "*shape"]:
    """Choose a number of entries, the largest ones.

    Args:
        values: Any shape.
        count: How many, from 0 to all. Of equal entries the first are chosen, on every machine.

    Returns:
        True where chosen.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    flat = values.flatten()
    least = flat.kthvalue(values.numel() - count + 1).values
    larger, equal = flat > least, flat == least
    return (larger | (equal & (equal.cumsum(0) <= count - larger.sum()))).reshape(values.shape)


def elect(deltas: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Mean of the entries that agree with the sign of their sum (TIES, arXiv 2306.01708, steps 2 and 3).

    Args:
        deltas: Trimmed deltas, at least one.

    Returns:
        For each entry the mean over the deltas that have the elected sign there; 0 where the sum is.
    """
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    sign = sum(deltas, start=total).sign()
    for delta in deltas:
        agrees = (delta.sign() == sign) & (sign != 0)
        total = total + torch.where(agrees, delta, 0.0)
        count = count + agrees
    return total / count.clamp_min(1)


def mean_cosine(deltas: Sequence[Float[Tensor, "*shape"]]) -> float:
    """Mean cosine over all pairs of deltas.

    Args:
        deltas: At least two.

    Returns:
        In [-1, 1].
    """
    pairs = [cosine(one, other) for one, other in combinations(deltas, 2)]
    return sum(pairs) / len(pairs)


def stock_ratio(alike: float, models: int, strength: float) -> float:
    """How much of the mean delta to keep (Model Stock, arXiv 2403.19522, section 4).

    The published ratio is `N c / (1 + (N - 1) c) = 1 / (1 + (1 - c) / (N c))`: it shrinks the mean by its noise over
    its signal. Here the price of noise is the strength, `1 / (1 + strength (1 - c) / (N c))`.

    Args:
        alike: `c`, the mean cosine.
        models: `N`.
        strength: At least 0; 1 is the published ratio.

    Returns:
        In [0, 1]; 0 where the models have nothing in common and strength is positive.
    """
    if strength == 0:
        return 1.0
    signal = models * max(alike, 0.0)
    return signal / (signal + strength * (1 - alike))


def alignment_cosine(delta: Float[Tensor, "*stack o i"], alignment: Float[Tensor, "*stack o i"]) -> float:
    """Cosine of a delta with its image under `C = V V^T / |V|` (SafeMERGE, arXiv 2503.17239; Safe LoRA's projection).

    Args:
        delta: `D` [out, in], or a stack of such matrices.
        alignment: `V`, aligned minus unaligned weight.

    Returns:
        In [0, 1]; 0 where nothing of the delta lies in the column space of `V`. It does not depend on the norm of `V`.
    """
    outputs, inputs = delta.shape[-2:]
    # Whichever product comes first is as small as can be: embeddings have far more inputs than outputs.
    if outputs < inputs:
        image = (alignment @ alignment.mT) @ delta
    else:
        image = alignment @ (alignment.mT @ delta)
    return max(cosine(delta, image), 0.0)


def chance_cosine(alignment: Float[Tensor, "*stack o i"]) -> float:
    """Alignment cosine that a delta of independent random entries has with a given `V`, to first order.

    With `D` random, `E <D, C D> = in tr(C)` and `E |C D|^2 = in tr(C^2)`, so the cosine is near
    `tr(C) / sqrt(out tr(C^2))`. It is 1 where `V` weighs all directions alike, `sqrt(rank / out)` where it does so
    within a subspace, and near `1 / sqrt(1 + out / in)` where `V` is random itself.

    Args:
        alignment: `V` [out, in], or a stack of such matrices.

    Returns:
        In [0, 1]; 0 where `V` is.
    """
    outputs, inputs = alignment.shape[-2:]
    # Of V V^T and V^T V, which have one trace and one norm, the smaller.
    gram = alignment @ alignment.mT if outputs < inputs else alignment.mT @ alignment
    squared = alignment.shape[:-2].numel() * outputs * _inner(gram, gram)
    return min(1.0, _inner(alignment, alignment) / math.sqrt(squared)) if squared else 0.0


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))
