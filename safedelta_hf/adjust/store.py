"""Where fine-tuned weights are kept: a model, an adapter, files."""

from types import TracebackType
from typing import Protocol

from safedelta_hf.deltas.dense import Delta
from safedelta_hf.records import Storage


class WeightStore(Protocol):
    """Fine-tuned weights whose deltas can be read and replaced one at a time.

    A context manager: writes happen inside its block, and leaving it on an exception undoes all of them.
    """

    @property
    def architecture(self) -> str:
        """Class name of the model, for the report."""
        ...

    @property
    def source(self) -> str:
        """Where the base weights come from, for the report."""
        ...

    def is_tuned(self, name: str) -> bool:
        """Whether the fine-tuning moved a parameter; raises if it or its base cannot be used."""
        ...

    def storage(self, name: str) -> Storage:
        """The kind of storage of a parameter's delta."""
        ...

    def delta(self, name: str) -> Delta:
        """The delta of a parameter."""
        ...

    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        """Keep what a delta that `delta` returned has become since; returns what there is to say about it."""
        ...

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
