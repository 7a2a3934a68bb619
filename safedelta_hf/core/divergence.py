"""How far a model's next tokens are from a teacher's of which only the likeliest were kept."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Targets(NamedTuple):
    """Next tokens of a teacher: log-probabilities of the likeliest, and of all others together.

    Attributes:
        log_probs: [n, k], float32; of every token in order where `tokens` is None, then k is the vocabulary.
        tokens: Their ids, [n, k], int64.
        rest: Log-probability that it is none of them, [n]; None beside `tokens`.
    """

    log_probs: Tensor
    tokens: Tensor | None = None
    rest: Tensor | None = None


def targets_of(logits_nv: Float[Tensor, "n v"], top_k: int | None) -> Targets:
    """What to keep of a teacher's predictions.

    Args:
        logits_nv: Its logits for n next tokens.
        top_k: How many tokens to keep of each; None for all.

    Returns:
        The targets.
    """
    log_probs = _log_probs(logits_nv)
    if top_k is None or top_k >= logits_nv.shape[-1]:
        return Targets(log_probs)
    kept = log_probs.topk(top_k, dim=-1)
    return Targets(kept.values, kept.indices, _rest(log_probs, kept.indices))


def divergence(logits_nv: Float[Tensor, "n v"], targets: Targets) -> Float[Tensor, "n"]:
    """Kullback-Leibler divergence `KL(teacher || student)` of each next token.

    With the k likeliest tokens kept, all others are one event: a lower bound of the whole divergence, by the
    log sum inequality, and equal to it where k is the vocabulary.

    Args:
        logits_nv: The student's logits.
        targets: The teacher's predictions of the same tokens.

    Returns:
        In nats, [n]; float32 or finer.
    """
    log_probs = _log_probs(logits_nv)
    if targets.tokens is None or targets.rest is None:
        return _summed(targets.log_probs, log_probs)
    rest = _rest(log_probs, targets.tokens)
    kept = _summed(targets.log_probs, log_probs.gather(-1, targets.tokens))
    return kept + _summed(targets.rest[:, None], rest[:, None])


def _log_probs(logits_nv: Tensor) -> Tensor:
    # Half precision would round them; what is finer than float32 stays as it is.
    return logits_nv.to(torch.promote_types(logits_nv.dtype, torch.float32)).log_softmax(-1)


def _rest(log_probs_nv: Tensor, tokens_nk: Tensor) -> Tensor:
    # Not 1 minus the others: that is all rounding where they have nearly all of the mass.
    return log_probs_nv.scatter(-1, tokens_nk, -torch.inf).logsumexp(-1)


def _summed(teacher: Tensor, student: Tensor) -> Tensor:
    probs = teacher.exp()
    return (probs * (teacher - student)).masked_fill(probs == 0, 0.0).sum(-1)
