"""A tiny model that has learned its refusals, and fine-tunes of it that lose them."""

import copy
import functools

import torch

from tests import tiny

REFUSALS = tiny.rows(24, seed=1)
TASK = tiny.rows(20, seed=5)


def _steps(model, rows, count, rate):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(count):
        for row in rows:
            tokens = {key: torch.tensor([value]) for key, value in row.items()}
            model(**tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


@functools.cache
def _base():
    return _steps(tiny.llama(), REFUSALS, 25, 2e-2)


def base():
    """A model to which the refusals are likely."""
    return copy.deepcopy(_base())


def fine_tuned(model=None, count=8):
    """What training on something else makes of it."""
    return _steps(model or base(), TASK, count, 2e-2)
