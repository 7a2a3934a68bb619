"""What an adapter does to one parameter of its base, in each of the forms that PEFT has for it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from safedelta_hf.records import Storage
from safedelta_hf.weights.delta import Delta, DenseDelta


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
