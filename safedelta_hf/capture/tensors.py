"""What holds the values of a tensor, and which tensors depend on what the model is given."""

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def weak_storage(tensor: Tensor) -> StorageWeakRef:
    """A weak reference to a tensor's storage.

    Args:
        tensor: Any tensor.

    Returns:
        The reference.
    """
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def storage_key(tensor: Tensor) -> int:
    """Address of a tensor's storage; not given to another storage while a weak reference to this one is held.

    Args:
        tensor: Any tensor.

    Returns:
        The address.
    """
    key: int = tensor.untyped_storage()._cdata
    return key


class DependentTensors:
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
