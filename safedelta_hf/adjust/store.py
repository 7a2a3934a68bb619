"""Where fine-tuned weights are kept: a model, an adapter, files."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import NamedTuple

from safedelta_hf.deltas.dense import Delta
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.report import Report
from safedelta_hf.report.records import ParameterRecord


class Written(NamedTuple):
    """What became of a delta that was written.

    Attributes:
        delta: What the weights carry of it, in their data types.
        notes: What there is to say about it.
    """

    delta: Delta
    notes: tuple[str, ...] = ()


class WeightStore(ABC):
    """Fine-tuned weights whose deltas can be read and replaced one at a time.

    A context manager: writes happen inside its block, and leaving it on an exception undoes all of them.

    Attributes:
        architecture: Class name of the model, for the report.
        source: Where the base weights come from, for the report.
        unverified: Why nothing could tell that the base is the profile's, for the report; empty where something did.
        running: The model that runs with these weights, where there is one in memory; strengths are measured by it.
        overwrites: Whether writing replaces the fine-tuned weights, so that all are looked at before any is written;
            else each is looked at when its turn comes, and read once.
    """

    architecture: str
    source: str
    unverified: str = ""
    running: ShardedModel | None = None
    overwrites: bool = True

    @abstractmethod
    def __enter__(self) -> object: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @abstractmethod
    def is_tuned(self, name: str) -> bool:
        """Whether the fine-tuning moved a parameter, or any that a weight is computed from.

        Args:
            name: Canonical parameter name, or that of a computed weight.

        Returns:
            False if it still holds the base weight, be it in another dtype.

        Raises:
            SafeDeltaError: It or its base weight cannot be used.
        """

    @abstractmethod
    def is_dense(self, name: str) -> bool:
        """Whether base and fine-tuned weight are both at hand, whole, so that any delta can be written.

        Args:
            name: Canonical parameter name.

        Returns:
            Whether they are.
        """

    @abstractmethod
    def delta(self, name: str) -> Delta:
        """The delta of a parameter.

        Args:
            name: Canonical name; `is_tuned` has looked at it.

        Returns:
            Tuned minus base, in the form in which it is kept.
        """

    @abstractmethod
    def write(self, name: str, delta: Delta) -> Written:
        """Keep what a delta has become.

        Args:
            name: Canonical name.
            delta: From `delta`, adjusted.

        Returns:
            What the weights now carry of it.
        """

    def finish(self, record: ParameterRecord) -> None:  # noqa: B027 - most stores have nothing to do
        """Be told that nothing more will happen to a parameter, however it fared.

        Args:
            record: What was done with it.
        """

    def conclude(self, report: Report) -> None:  # noqa: B027 - some stores are told of later
        """Be told, at the end of the block, what was done, for whatever is saved to say so.

        Args:
            report: Of all parameters.
        """

    def require_base(self) -> None:  # noqa: B027 - of an adapter, the base is found otherwise
        """Make sure that the base is the profile's, where no fine-tuned weight differs from the profile's base.

        Raises:
            SafeDeltaError: It is not, so the profile's base was given as the fine-tuned model.
        """

    @abstractmethod
    def restore(self) -> None:
        """Put back every fine-tuned weight that was written over; each may be written again."""
