"""Plain values on their way between processes; tensors in them travel apart."""

import io
import pickle
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:  # noqa: ANN401
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value.detach())
        return len(self._tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:  # noqa: ANN401
        tensor: Tensor = self._tensors[number]
        return tensor


def packed_value(value: object, tensors: list[Tensor]) -> bytes:
    """Everything of a value but its tensors.

    Args:
        value: Anything that can be pickled.
        tensors: Grows by its tensors.

    Returns:
        What `unpacked_value` needs beside them.
    """
    file = io.BytesIO()
    _Packer(file, tensors).dump(value)
    return file.getvalue()


def unpacked_value(packed: bytes, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401
    """A value put together again.

    Args:
        packed: What `packed_value` returned on another process of the same run.
        tensors: Its tensors, in order.

    Returns:
        The value.
    """
    return _Unpacker(io.BytesIO(packed), tensors).load()
