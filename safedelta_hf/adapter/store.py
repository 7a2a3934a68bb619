"""An adapter: the deltas of the parameters that it tunes, wherever its tensors are held."""

from collections.abc import Sequence
from types import TracebackType

from safedelta_hf.deltas.dense import Delta, require_finite
from safedelta_hf.deltas.lora_deltas import AdapterPart, Replaces
from safedelta_hf.errors import AdapterError
from safedelta_hf.records import Storage


class AdapterStore:
    """The parts of one adapter, adjusted in place.

    Args:
        parts: What the adapter does to each parameter.
        architecture: Class name of the base model.
        source: Where the base weights are, for the report.
        writer: What writes the adapter's tensors.

    Raises:
        AdapterError: Two parts tune one parameter.
    """

    def __init__(self, parts: Sequence[AdapterPart], *, architecture: str, source: str, writer: Replaces) -> None:
        self.architecture = architecture
        self.source = source
        self._writer = writer
        self._parts: dict[str, AdapterPart] = {}
        for part in parts:
            if part.parameter in self._parts:
                raise AdapterError(
                    f"{part.parameter}: tuned in two places (a tied weight?), so there is no one delta to adjust; "
                    "merge the adapter and use adjust_model"
                )
            self._parts[part.parameter] = part

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tuned parameters, by canonical name."""
        return {name: part.shape for name, part in self._parts.items()}

    def __enter__(self) -> "AdapterStore":
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def is_tuned(self, name: str) -> bool:
        """Whether the fine-tuning moved a parameter.

        Args:
            name: Canonical parameter name.

        Returns:
            Whether its delta is not zero.

        Raises:
            AdapterError: The adapter has rank 0 there.
        """
        for place, tensor in self._parts[name].tensors().items():
            if not tensor.numel():
                raise AdapterError(f"{place}: has the shape {list(tensor.shape)}, so the adapter has rank 0 there")
            require_finite(place, tensor)
        return self._parts[name].delta().tuned_energy > 0

    def storage(self, name: str) -> Storage:
        """The kind of storage of a parameter's delta.

        Args:
            name: Canonical parameter name.

        Returns:
            The kind.
        """
        return self._parts[name].storage

    def delta(self, name: str) -> Delta:
        """The delta of a parameter.

        Args:
            name: Canonical parameter name.

        Returns:
            In the form in which the adapter holds it.
        """
        return self._parts[name].delta()

    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        """Let the adapter carry what is kept of a delta.

        Args:
            name: Canonical parameter name.
            delta: From `delta`, adjusted.

        Returns:
            What there is to say about it.
        """
        return self._parts[name].write(delta, self._writer)
