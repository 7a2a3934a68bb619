"""Second moments of layer inputs: additive, so that batches, files and ranks merge alike."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from safedelta_hf.core.low_rank import Matrix, total_of


@dataclass(frozen=True, kw_only=True)
class InputMoment:
    """Sum over tokens of `x x^T`, or of `x^2` where inputs do not mix (embedding, norm scale, bias).

    Attributes:
        total: [in, in], of low rank where there are few tokens, or [in] for the diagonal kind; float32.
        sequences: Number of safety sequences read, the N of `H = (2/N) X^T X`.
        tokens: Number of input vectors summed; 0 where the safety data never reached the layer.
    """

    total: Matrix
    sequences: int
    tokens: int

    def hessian(self, device: torch.device) -> Matrix:
        """Hessian of the output-reconstruction loss (Safe Delta, arXiv 2505.12038, section 4).

        Args:
            device: Where the result is wanted.

        Returns:
            `(2/N) * total`, new, [in, in] or [in], float32; of low rank where the moment is.
        """
        return self.total.to(device, torch.float32) * (2.0 / max(self.sequences, 1))

    def merge(self, other: "InputMoment") -> "InputMoment":
        """Moment of the union of two disjoint sets of sequences.

        Args:
            other: Moment of the same layer over other sequences.

        Returns:
            A new moment.
        """
        return InputMoment(
            total=total_of([self.total, other.total]),
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
        )


PANEL = 256
"""Rows of a moment that are summed at once. Of each panel, what lies left of its square on the diagonal is left out."""


def add_outer_(total: Float[Tensor, "i i"], inputs: Num[Tensor, "t i"]) -> None:
    """Add `X^T X` to a moment in place, in float32 whatever the dtype of the model and of an autocast around it.

    As it is symmetric, little more than the upper half is summed; `fill_lower_` makes it whole in the end.

    Args:
        total: [in, in] float32, changed in place; it may live on another device than the inputs.
        inputs: [tokens, in] of any floating dtype.
    """
    inputs = inputs.to(torch.float32)
    kind = inputs.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        for start in range(0, len(total), PANEL):
            panel, right = total[start : start + PANEL, start:], inputs[:, start:]
            left = right[:, :PANEL].T
            if total.device == inputs.device:
                panel.addmm_(left, right)
            else:
                panel.add_((left @ right).to(total.device))


def fill_lower_(total: Float[Tensor, "i i"]) -> None:
    """Make a moment symmetric in place, of which `add_outer_` has summed the upper half.

    Args:
        total: [in, in] float32.
    """
    for start in range(0, len(total), PANEL):
        stop = start + PANEL
        total[stop:, start:stop] = total[start:stop, stop:].T
