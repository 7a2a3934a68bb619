"""Which tensors depend on what the model is given."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safedelta_hf.capture.identity import storage_key, weak_storage


class Descendants:
    """Tensors that hold anything computed from the data, or made during the call, such as positions.

    Anything else that a weight is combined with, such as a buffer, makes another weight of it.
    """

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Forget all, and begin with these.

        Args:
            tensors: What the model is given.
        """
        self._storages.clear()
        self.add(tensors)

    def add(self, tensors: Sequence[Tensor] | Iterator[Tensor]) -> None:
        """Count tensors as data.

        Args:
            tensors: Results of operations on data.
        """
        for tensor in tensors:
            self._storages.setdefault(storage_key(tensor), weak_storage(tensor))

    def discard(self, tensor: Tensor) -> None:
        """Count a tensor as data no longer.

        Args:
            tensor: Any tensor.
        """
        self._storages.pop(storage_key(tensor), None)

    def __contains__(self, tensor: object) -> bool:
        return isinstance(tensor, Tensor) and storage_key(tensor) in self._storages
