"""What holds the values of a tensor, as long as it lives."""

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
