"""Plain values on their way between processes; tensors in them travel apart."""

import io
import pickle
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor], known: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors, self._known = tensors, known

    def persistent_id(self, value: Any) -> int | None:  # noqa: ANN401
        if not isinstance(value, Tensor):
            return None
        for number, one in enumerate((*self._known, *self._tensors)):
            if one is value:
                return number
        self._tensors.append(value)
        return len(self._known) + len(self._tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:  # noqa: ANN401
        tensor: Tensor = self._tensors[number]
        return tensor


def packed_value(value: object, tensors: list[Tensor], known: Sequence[Tensor] = ()) -> bytes:
    """Everything of a value but its tensors.

    Args:
        value: Anything that can be pickled.
        tensors: Grows by its tensors, but for the known ones.
        known: Tensors that the others have already.

    Returns:
        What `unpacked_value` needs beside them.
    """
    file = io.BytesIO()
    _Packer(file, tensors, known).dump(value)
    return file.getvalue()


def unpacked_value(packed: bytes, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401
    """A value put together again.

    Args:
        packed: What `packed_value` returned on another process of the same run.
        tensors: The known ones and its own, in order.

    Returns:
        The value.
    """
    return _Unpacker(io.BytesIO(packed), tensors).load()
