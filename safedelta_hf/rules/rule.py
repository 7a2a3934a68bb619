"""What a rule is: curvature and column statistics in, a transform out. It never sees a weight."""

from typing import Any, Protocol

from torch import Tensor

from safedelta_hf.core.transform import Transform


class DeltaStatistics(Protocol):
    """What a rule may ask about a delta, wherever and in whatever form it is stored."""

    @property
    def rows(self) -> int:
        """Output features of the whole layer, over all ranks."""
        ...

    def column_energy(self, transform: Transform | None = None) -> Tensor:
        """Sum over rows of the squared (transformed) delta, [columns] float32."""
        ...


class State(Protocol):
    """What a rule makes of a Hessian; read by that rule alone, but for the notes."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Numerical trouble met on the way, for the report."""
        ...


class Rule(Protocol):
    """Turns the Hessian of a layer into a transform of its delta.

    A rule is a frozen dataclass whose fields are its settings. `prepare` holds what depends on the Hessian alone, so
    that layers with the same inputs share it; the state it returns is passed back to `transform` unread.
    """

    @property
    def name(self) -> str:
        """Registered name, as in reports and on the command line."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The fields, as plain values."""
        ...

    def prepare(self, hessian: Tensor) -> State:
        """Factor a Hessian, [in, in] or its diagonal [in]."""
        ...

    def transform(self, state: Any, delta: DeltaStatistics) -> Transform:  # noqa: ANN401 - the rule's own state
        """Turn the state and the statistics of one delta into its transform."""
        ...
