"""An adapter: the deltas of the parameters that it tunes, wherever its tensors are held."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from typing_extensions import override

from safedelta_hf.adjust.store import WeightStore
from safedelta_hf.deltas.dense import Delta, require_finite
from safedelta_hf.deltas.lora_deltas import AdapterPart, Replaces
from safedelta_hf.errors import AdapterError
from safedelta_hf.records import Storage


class AdapterStore(WeightStore):
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

    @override
    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    @override
    def is_tuned(self, name: str) -> bool:
        for place, tensor in self._parts[name].tensors().items():
            if not tensor.numel():
                raise AdapterError(f"{place}: has the shape {list(tensor.shape)}, so the adapter has rank 0 there")
            require_finite(place, tensor)
        return self._parts[name].delta().tuned_energy > 0

    @override
    def storage(self, name: str) -> Storage:
        return self._parts[name].storage

    @override
    def delta(self, name: str) -> Delta:
        return self._parts[name].delta()

    @override
    def write(self, name: str, delta: Delta) -> tuple[str, ...]:
        return self._parts[name].write(delta, self._writer)
