"""LoRA pairs, on one weight and on a stack of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safedelta_hf.records import Storage
from safedelta_hf.weights.adapter_parts import Replaces
from safedelta_hf.weights.delta import Delta
from safedelta_hf.weights.factored import FactoredDelta, Factors, StackedDelta, distance, energy


@dataclass(frozen=True, kw_only=True)
class LowRankPart:
    """A LoRA pair on a weight: `s B A`, or its transpose where the weight is stored with its inputs first.

    Attributes:
        parameter: Canonical name of the weight.
        shape: Shape of the weight.
        down: `A`, [rank, in], or [rank, in, *kernel] of a convolution.
        up: `B`, [out, rank], or [out, rank, 1, ...].
        scaling: `s`.
        transposed: Whether the weight is stored [in, out].
    """

    parameter: str
    shape: tuple[int, ...]
    down: Tensor
    up: Tensor
    scaling: float
    transposed: bool
    storage: ClassVar[Storage] = Storage.ADAPTER

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name.

        Returns:
            `A` and `B`.
        """
        return {f"{self.parameter} (A)": self.down, f"{self.parameter} (B)": self.up}

    def delta(self) -> FactoredDelta:
        """The delta of the weight.

        Returns:
            Its factors.
        """
        down, up = self.down.flatten(1), self.up.flatten(1)
        return FactoredDelta(down.T, up.T, self.scaling) if self.transposed else FactoredDelta(up, down, self.scaling)

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Put what is kept of the delta into `A` and `B`.

        Args:
            delta: From `delta`, adjusted.
            writer: What writes.

        Returns:
            What rounding to the dtype of the adapter costs, if it is not float32.
        """
        assert isinstance(delta, FactoredDelta), "a LoRA pair has a factored delta"
        left, right = delta.factors
        down, up = (left.T, right.T) if self.transposed else (right, left)
        for name, tensor, value in zip(self.tensors(), (self.down, self.up), (down, up), strict=True):
            writer.replace(name, tensor, value.reshape(tensor.shape))
        return rounding([self.delta().factors], [delta.factors], self.scaling, self.down.dtype)


@dataclass(frozen=True, kw_only=True)
class ExpertsPart:
    """A LoRA pair for each matrix of a stack: `s B_e A_e`, or its transpose where matrices are stored [in, out].

    Attributes:
        parameter: Canonical name of the stack.
        shape: Its shape, [experts, first, second].
        down: `A` of all experts, [experts * rank, in].
        up: `B` of all experts, [out, rank * experts]; experts run fastest.
        scaling: `s`.
        transposed: Whether matrices are stored [in, out].
    """

    parameter: str
    shape: tuple[int, ...]
    down: Tensor
    up: Tensor
    scaling: float
    transposed: bool
    storage: ClassVar[Storage] = Storage.ADAPTER

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name.

        Returns:
            `A` and `B`.
        """
        return {f"{self.parameter} (A)": self.down, f"{self.parameter} (B)": self.up}

    def delta(self) -> StackedDelta:
        """The delta of the stack.

        Returns:
            The factors of each matrix.
        """
        experts, first, second = self.shape
        downs = self.down.reshape(experts, -1, self.down.shape[1])
        ups = self.up.reshape(len(self.up), -1, experts).permute(2, 0, 1)
        pairs = ((down.T, up.T) if self.transposed else (up, down) for down, up in zip(downs, ups, strict=True))
        return StackedDelta([FactoredDelta(*pair, self.scaling) for pair in pairs], first * second)

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Put what is kept of the delta into `A` and `B`.

        Args:
            delta: From `delta`, adjusted.
            writer: What writes.

        Returns:
            What rounding to the dtype of the adapter costs, if it is not float32.
        """
        assert isinstance(delta, StackedDelta), "a stack has a delta for each matrix"
        lefts, rights = zip(*(part.factors for part in delta.parts), strict=True)
        left, right = torch.stack(lefts), torch.stack(rights)
        down, up = (left.mT, right.mT) if self.transposed else (right, left)
        values = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        for name, tensor, value in zip(self.tensors(), (self.down, self.up), values, strict=True):
            writer.replace(name, tensor, value)
        written = [part.factors for part in self.delta().parts]
        return rounding(written, [part.factors for part in delta.parts], self.scaling, self.down.dtype)


def rounding(
    written: Sequence[Factors], exact: Sequence[Factors], scaling: float, dtype: torch.dtype
) -> tuple[str, ...]:
    """Say what rounding costs.

    Args:
        written: Factors of each matrix as they are held.
        exact: The same in float32.
        scaling: `s`.
        dtype: Data type of the adapter.

    Returns:
        A sentence, or nothing where nothing was rounded.
    """
    moved = sum(distance(one, other, scaling) for one, other in zip(written, exact, strict=True))
    if dtype in (torch.float32, torch.float64) or not moved:
        return ()
    share = (moved / sum(energy(*pair, scaling) for pair in exact)) ** 0.5
    return (f"rounding to {str(dtype).removeprefix('torch.')} moved the adjusted delta by {share:.1%} of its norm",)
