"""Which batches each rank runs."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from safedelta_hf.capture.forward import batches_of_equal_length
from safedelta_hf.capture.safety_data import SafetySequence
from safedelta_hf.ranks import Ranks
from safedelta_hf.sharding.holding import Holding

Batch = tuple[SafetySequence, ...]


@dataclass(frozen=True)
class Share:
    """The batches of one rank, of sequences of one length each.

    Attributes:
        batches: Those that count.
        idle: Batches to run after them for the other ranks' sake, whose results nobody wants.
    """

    batches: tuple[Batch, ...]
    idle: tuple[Batch, ...]

    def __len__(self) -> int:
        return len(self.batches) + len(self.idle)

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        """All batches, each with whether it counts."""
        yield from ((batch, True) for batch in self.batches)
        yield from ((batch, False) for batch in self.idle)


def share_of(sequences: Sequence[SafetySequence], batch_size: int, ranks: Ranks, *, collective: bool) -> Share:
    """This rank's part of the data.

    Args:
        sequences: All of the data, the same on all ranks.
        batch_size: Sequences per batch, at most.
        ranks: The ranks that share it.
        collective: Whether all ranks need the same number of forward passes.

    Returns:
        Its batches, longest sequences first, so that memory trouble shows at once.
    """
    ordered = sorted(sequences, key=lambda sequence: len(sequence.input_ids), reverse=True)
    own = tuple(batches_of_equal_length(ranks.share(ordered), batch_size))
    if not collective:
        return Share(own, ())
    parts = (ordered[rank :: ranks.size] for rank in range(ranks.size))
    most = max(sum(1 for _ in batches_of_equal_length(part, batch_size)) for part in parts)
    return Share(own, (tuple(ordered[-1:]),) * (most - len(own)))


def forward_guard(ranks: Ranks, holding: Holding) -> AbstractContextManager[None]:
    """What a forward pass runs inside, so that an error in it is dealt with.

    Args:
        ranks: The ranks that run one.
        holding: How they hold the model's parameters.

    Returns:
        A context.
    """
    return ranks.within_collectives() if holding.collective else nullcontext()
