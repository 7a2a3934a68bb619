"""An adapter: the deltas of the parameters that it tunes, and how its tensors are replaced, wherever they are held."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor
from typing_extensions import override

from safedelta_hf.adjust.store import WeightStore, Written
from safedelta_hf.deltas.dense import Delta, require_finite
from safedelta_hf.deltas.lora_deltas import LoraDelta, by_parameter
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import AdapterError
from safedelta_hf.report import Report
from safedelta_hf.report.saving import follow_saving
from safedelta_hf.weights.journal import Journal


class AdapterStore(WeightStore):
    """The deltas of one adapter.

    Args:
        deltas: What the adapter does to each parameter.
        architecture: Class name of the base model.
        source: Where the base weights are, for the report.

    Raises:
        AdapterError: Two of them tune one parameter.
    """

    def __init__(self, deltas: Sequence[LoraDelta], *, architecture: str, source: str) -> None:
        self.architecture = architecture
        self.source = source
        self._deltas = by_parameter(deltas)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tuned parameters, by canonical name."""
        return {name: delta.shape for name, delta in self._deltas.items()}

    @override
    def is_tuned(self, name: str) -> bool:
        for own, tensor in self._deltas[name].tensors.items():
            if not tensor.numel():
                raise AdapterError(f"{own}: has the shape {list(tensor.shape)}, so the adapter has rank 0 there")
            require_finite(own, tensor)
        return self._deltas[name].delta().tuned_energy > 0

    @override
    def is_dense(self, name: str) -> bool:
        return self._deltas[name].is_dense

    @override
    def delta(self, name: str) -> Delta:
        return self._deltas[name].delta()

    @override
    def write(self, name: str, delta: Delta) -> Written:
        adjusted = self._deltas[name].adjusted(delta)
        for own, value in adjusted.tensors.items():
            self.replace(own, value)
        return Written(adjusted.delta, adjusted.notes)

    @abstractmethod
    def replace(self, name: str, value: Tensor) -> None:
        """Give one of the adapter's tensors another value.

        Args:
            name: Its name.
            value: All of it.
        """


class AdapterInMemory(AdapterStore):
    """An adapter on a model in memory, changed in place; a failure puts back what it was.

    Args:
        deltas: What the adapter does to each parameter; its tensors go by their names in the model.
        model: The model that has the adapter.
        workspace: Folder with room for a temporary copy of the adapter; None for the system's default.
        name: Name of the adapter.
        architecture: Class name of the base model.
    """

    def __init__(
        self, deltas: Sequence[LoraDelta], model: ShardedModel, workspace: Path | None, *, name: str, architecture: str
    ) -> None:
        super().__init__(deltas, architecture=architecture, source="the frozen base below the adapter")
        self.running = self._model = model
        self._name = name
        self._journal = Journal(workspace, model.ranks)

    @override
    def __enter__(self) -> "AdapterInMemory":
        self._journal.__enter__()
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    @override
    def conclude(self, report: Report) -> None:
        follow_saving(self._model.model, report, adapter=self._name, writes=self._model.ranks.is_main)

    @override
    def restore(self) -> None:
        self._journal.restore()

    @override
    def replace(self, name: str, value: Tensor) -> None:
        self._journal.replace(self._model.parameter(name), self._model.shard(name).of(value))


class AdapterInFiles(AdapterStore):
    """An adapter that becomes a folder once its block has succeeded.

    Args:
        deltas: What the adapter does to each parameter.
        finish: Writes the folder, given every tensor that was replaced, by name, and what was done.
        architecture: Class name of the base model.
        source: Where the base weights are, for the report.
        unverified: As in `WeightStore`.
    """

    def __init__(
        self,
        deltas: Sequence[LoraDelta],
        finish: Callable[[dict[str, Tensor], Report], None],
        *,
        architecture: str,
        source: str,
        unverified: str = "",
    ) -> None:
        super().__init__(deltas, architecture=architecture, source=source)
        self.unverified = unverified
        self._finish = finish
        self._replaced: dict[str, Tensor] = {}
        self._report: Report | None = None

    @override
    def __enter__(self) -> "AdapterInFiles":
        return self

    @override
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._report is not None, "concluded within the block"
            self._finish(self._replaced, self._report)

    @override
    def conclude(self, report: Report) -> None:
        self._report = report

    @override
    def restore(self) -> None:
        self._replaced.clear()

    @override
    def replace(self, name: str, value: Tensor) -> None:
        self._replaced[name] = value.detach().cpu().contiguous()
