"""What an adapter does to one parameter of its base, in each of the forms that PEFT has for it.

Each form names the adapter's own tensors, gives the delta that they make, and says what they have to become for an
adjusted one. Where the tensors are held, and who replaces them, is not its concern.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.low_rank import FactoredDelta, StackedDelta
from safedelta_hf.errors import AdapterError


class Adjusted(NamedTuple):
    """What an adapter has to hold for an adjusted delta.

    Attributes:
        tensors: New values of the adapter's own tensors, by name, in their data types.
        delta: What they carry of it.
        notes: What there is to say about it.
    """

    tensors: Mapping[str, Tensor]
    delta: Delta
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LoraDelta(ABC):
    """What an adapter does to one parameter of its base.

    Attributes:
        parameter: Canonical name of the parameter.
        shape: Its shape.
        tensors: The adapter's own tensors, whole, by their names.
    """

    parameter: str
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def is_dense(self) -> bool:
        """Whether base and fine-tuned weight are both at hand, whole, so that any delta can be written."""
        return False

    @abstractmethod
    def delta(self) -> Delta:
        """The delta of the parameter.

        Returns:
            In the form in which the adapter holds it.
        """

    @abstractmethod
    def adjusted(self, delta: Delta) -> Adjusted:
        """What the adapter has to hold for an adjusted delta.

        Args:
            delta: From `delta`, adjusted.

        Returns:
            New values of its tensors.
        """


@dataclass(frozen=True, kw_only=True)
class FullDelta(LoraDelta):
    """A whole parameter that the adapter carries beside the base's own.

    Attributes:
        base: The base parameter, of the same shape.
    """

    base: Tensor

    @property
    @override
    def is_dense(self) -> bool:
        return True

    @override
    def delta(self) -> DenseDelta:
        (tuned,) = self.tensors.values()
        return DenseDelta(tuned, self.base)

    @override
    def adjusted(self, delta: Delta) -> Adjusted:
        assert isinstance(delta, DenseDelta), "a whole parameter has a dense delta"
        written = delta.rounded()
        return Adjusted(dict.fromkeys(self.tensors, written.weight()), written)


@dataclass(frozen=True, kw_only=True)
class BiasDelta(LoraDelta):
    """An offset that the adapter adds to a bias of the base, times the scaling of its LoRA.

    Attributes:
        scaling: `s`.
    """

    scaling: float

    @override
    def delta(self) -> DenseDelta:
        (offset,) = self.tensors.values()
        scaled = offset.detach().float() * self.scaling
        return DenseDelta(scaled, torch.zeros_like(scaled))

    @override
    def adjusted(self, delta: Delta) -> Adjusted:
        assert isinstance(delta, DenseDelta), "a bias has a dense delta"
        ((name, own),) = self.tensors.items()
        offset = own.detach() if delta.is_whole else (delta.weight() / self.scaling).to(own.dtype)
        return Adjusted({name: offset}, delta.held_as(offset.float() * self.scaling))


@dataclass(frozen=True, kw_only=True)
class TokenRowsDelta(LoraDelta):
    """Rows of an embedding that the adapter replaces.

    Attributes:
        indices: Which rows its tensor [tokens, features] replaces, [tokens].
        base: The whole embedding of the base.
    """

    indices: Tensor
    base: Tensor

    @override
    def delta(self) -> DenseDelta:
        (rows,) = self.tensors.values()
        base = self.base.detach().to(torch.promote_types(self.base.dtype, rows.dtype))  # so that no row is rounded
        return DenseDelta(base.index_copy(0, self.indices, rows.detach().to(base)), base)

    @override
    def adjusted(self, delta: Delta) -> Adjusted:
        assert isinstance(delta, DenseDelta), "an embedding has a dense delta"
        ((name, own),) = self.tensors.items()
        weight = delta.weight()
        # No rule mixes tokens, so the delta is still zero everywhere else.
        rows = weight[self.indices].to(own.dtype)
        return Adjusted({name: rows}, delta.held_as(weight.index_copy(0, self.indices, rows.to(weight))))


@dataclass(frozen=True, kw_only=True)
class LowRankDelta(LoraDelta):
    """A LoRA pair on a weight: `s B A`, or its transpose where the weight is stored with its inputs first.

    Its tensors are `A`, [rank, in], or [rank, in, *kernel] of a convolution, and `B`, [out, rank], or
    [out, rank, 1, ...].

    Attributes:
        scaling: `s`.
        transposed: Whether the weight is stored [in, out].
    """

    scaling: float
    transposed: bool

    @override
    def delta(self) -> FactoredDelta:
        # Copied, since the tensors may be those that are written over.
        down, up = (tensor.detach().clone().flatten(1) for tensor in self.tensors.values())
        return FactoredDelta(down.T, up.T, self.scaling) if self.transposed else FactoredDelta(up, down, self.scaling)

    @override
    def adjusted(self, delta: Delta) -> Adjusted:
        assert isinstance(delta, FactoredDelta), "a LoRA pair has a factored delta"
        written = delta.rounded()
        left, right = written.factors
        pair = (left.T, right.T) if self.transposed else (right, left)
        named = zip(self.tensors.items(), pair, strict=True)
        return Adjusted({name: value.reshape(own.shape).to(own.dtype) for (name, own), value in named}, written)


@dataclass(frozen=True, kw_only=True)
class ExpertsDelta(LoraDelta):
    """A LoRA pair for each matrix of a stack: `s B_e A_e`, or its transpose where matrices are stored [in, out].

    Its tensors are `A` of all experts, [experts * rank, in], and `B` of all experts, [out, rank * experts], in which
    experts run fastest.

    Attributes:
        scaling: `s`.
        transposed: Whether matrices are stored [in, out].
    """

    scaling: float
    transposed: bool

    @override
    def delta(self) -> StackedDelta:
        experts, first, second = self.shape
        down, up = (tensor.detach().clone() for tensor in self.tensors.values())
        downs = down.reshape(experts, -1, down.shape[1])
        ups = up.reshape(len(up), -1, experts).permute(2, 0, 1)
        pairs = ((down.T, up.T) if self.transposed else (up, down) for down, up in zip(downs, ups, strict=True))
        return StackedDelta([FactoredDelta(*pair, self.scaling) for pair in pairs], first * second)

    @override
    def adjusted(self, delta: Delta) -> Adjusted:
        assert isinstance(delta, StackedDelta), "a stack has a delta for each matrix"
        written = delta.rounded()
        lefts, rights = zip(*(one.factors for one in written.products), strict=True)
        left, right = torch.stack(lefts), torch.stack(rights)
        down, up = (left.mT, right.mT) if self.transposed else (right, left)
        values = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        named = zip(self.tensors.items(), values, strict=True)
        return Adjusted({name: value.to(own.dtype) for (name, own), value in named}, written)


def low_rank_shape(down: Tensor, up: Tensor, *, transposed: bool) -> tuple[int, ...]:
    """Shape of the weight that a LoRA pair tunes.

    Args:
        down: `A`, [rank, in, ...].
        up: `B`, [out, rank, ...].
        transposed: Whether the weight is stored [in, out].

    Returns:
        The shape of their product.
    """
    return (down.shape[1], up.shape[0]) if transposed else (up.shape[0], *down.shape[1:])


def by_parameter(deltas: Iterable[LoraDelta]) -> dict[str, LoraDelta]:
    """The one delta of each parameter that an adapter tunes.

    Args:
        deltas: What the adapter does to each parameter.

    Returns:
        The deltas by canonical name.

    Raises:
        AdapterError: Two of them tune one parameter.
    """
    found: dict[str, LoraDelta] = {}
    for delta in deltas:
        if delta.parameter in found:
            places = " and by ".join(next(iter(one.tensors)) for one in (found[delta.parameter], delta))
            raise AdapterError(
                f"{delta.parameter}: the adapter tunes it in two places, by {places}, as it may a weight that is tied, "
                "so there is no one delta to adjust. Let it tune one of the two, or both by "
                "LoraConfig(modules_to_save=['embed_tokens'], ensure_weight_tying=True). An adapter that is trained "
                "already can be adjusted on a base whose head is untied (lm_head.weight = nn.Parameter(<a copy of "
                "it>), config.tie_word_embeddings = False), with a profile of that base"
            )
        found[delta.parameter] = delta
    return found
