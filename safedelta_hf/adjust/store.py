"""Where fine-tuned weights are kept: a model, an adapter, files."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from safedelta_hf.deltas.dense import Delta
from safedelta_hf.records import Storage


class WeightStore(ABC):
    """Fine-tuned weights whose deltas can be read and replaced one at a time.

    A context manager: writes happen inside its block, and leaving it on an exception undoes all of them.

    Attributes:
        architecture: Class name of the model, for the report.
        source: Where the base weights come from, for the report.
    """

    architecture: str
    source: str

    @abstractmethod
    def is_tuned(self, name: str) -> bool:
        """Whether the fine-tuning moved a parameter; raises if it or its base cannot be used.

        Args:
            name: Canonical name.

        Returns:
            False if it still holds the base weight, be it in another dtype.
        """

    @abstractmethod
    def storage(self, name: str) -> Storage:
        """The kind of storage of a parameter's delta.

        Args:
            name: Canonical name.

        Returns:
            The kind.
        """

    @abstractmethod
    def delta(self, name: str) -> Delta:
        """The delta of a parameter, tuned minus base.

        Args:
            name: Canonical name; `is_tuned` has looked at it.

        Returns:
            In the form in which the store holds it.
        """

    @abstractmethod
    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        """Keep what a delta has become.

        Args:
            name: Canonical name.
            delta: From `delta`, adjusted.

        Returns:
            What there is to say about it.
        """

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
