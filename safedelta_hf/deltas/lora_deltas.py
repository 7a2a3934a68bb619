"""What an adapter does to one parameter of its base, in each of the forms that PEFT has for it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.low_rank import FactoredDelta, Factors, StackedDelta, distance, energy
from safedelta_hf.records import Storage


class Replaces(AbstractContextManager[object], Protocol):
    """Writes tensors in place; leaving its block on an exception puts all of them back."""

    def replace(self, name: str, parameter: Tensor, value: Tensor) -> None:
        """Write a new value into a tensor."""
        ...


class AdapterPart(Protocol):
    """What an adapter does to one parameter of its base."""

    @property
    def parameter(self) -> str:
        """Canonical name of the parameter."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        ...

    @property
    def storage(self) -> Storage:
        """The kind of storage of its delta."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name."""
        ...

    def delta(self) -> Delta:
        """The delta of the parameter."""
        ...

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Put what is kept of the delta into the adapter's tensors; returns what there is to say about it."""
        ...


@dataclass(frozen=True, kw_only=True)
class DensePart:
    """A whole parameter that the adapter carries beside the base's own.

    Attributes:
        parameter: Canonical name of the base parameter.
        tuned: The adapter's copy, trained.
        base: The base parameter, of the same shape.
    """

    parameter: str
    tuned: Tensor
    base: Tensor
    storage: ClassVar[Storage] = Storage.DENSE

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return tuple(self.tuned.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name.

        Returns:
            The trained copy.
        """
        return {self.parameter: self.tuned}

    def delta(self) -> DenseDelta:
        """The delta of the parameter.

        Returns:
            Tuned minus base.
        """
        return DenseDelta(self.tuned, self.base)

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Put what is kept of the delta into the trained copy.

        Args:
            delta: From `delta`, adjusted.
            writer: What writes.

        Returns:
            Nothing to say.
        """
        assert isinstance(delta, DenseDelta), "a whole parameter has a dense delta"
        writer.replace(self.parameter, self.tuned, delta.weight())
        return ()


@dataclass(frozen=True, kw_only=True)
class OffsetPart:
    """A bias that the adapter adds to the base's own, times the scaling of its LoRA.

    Attributes:
        parameter: Canonical name of the bias.
        offset: What is added, before scaling, [out].
        scaling: `s`.
    """

    parameter: str
    offset: Tensor
    scaling: float
    storage: ClassVar[Storage] = Storage.ADAPTER

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bias."""
        return tuple(self.offset.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name.

        Returns:
            The offset.
        """
        return {self.parameter: self.offset}

    def delta(self) -> DenseDelta:
        """The delta of the bias.

        Returns:
            The offset, scaled.
        """
        scaled = self.offset.detach().float() * self.scaling
        return DenseDelta(scaled, torch.zeros_like(scaled))

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Put what is kept of the delta into the offset.

        Args:
            delta: From `delta`, adjusted.
            writer: What writes.

        Returns:
            Nothing to say.
        """
        assert isinstance(delta, DenseDelta), "a bias has a dense delta"
        writer.replace(self.parameter, self.offset, delta.weight() / self.scaling)
        return ()


@dataclass(frozen=True, kw_only=True)
class TokenRowsPart:
    """Rows of an embedding that the adapter replaces.

    Attributes:
        parameter: Canonical name of the embedding.
        rows: The replacements, [tokens, features].
        indices: Which rows they replace, [tokens].
        base: The whole embedding of the base.
    """

    parameter: str
    rows: Tensor
    indices: Tensor
    base: Tensor
    storage: ClassVar[Storage] = Storage.ADAPTER

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the embedding."""
        return tuple(self.base.shape)

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's own tensors by name.

        Returns:
            The replacements.
        """
        return {self.parameter: self.rows}

    def delta(self) -> DenseDelta:
        """The delta of the embedding: zero but for the rows.

        Returns:
            Tuned minus base.
        """
        base = self.base.detach()
        return DenseDelta(base.index_copy(0, self.indices, self.rows.detach().to(base)), base)

    def write(self, delta: Delta, writer: Replaces) -> tuple[str, ...]:
        """Put what is kept of the delta into the rows.

        Args:
            delta: From `delta`, adjusted.
            writer: What writes.

        Returns:
            Nothing to say: no rule mixes tokens, so the delta is still zero everywhere else.
        """
        assert isinstance(delta, DenseDelta), "an embedding has a dense delta"
        weight = delta.weight()
        writer.replace(self.parameter, self.rows, weight[self.indices])
        return ()


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
