"""A moment as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from safedelta_hf.profile.encodings.encoding import Encoding, Layout


@dataclass(frozen=True)
class Float32(Encoding):
    """All entries, exactly; of the diagonal kind too."""

    name: ClassVar[str] = "float32"

    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        """One tensor.

        Args:
            shape: Shape of the moment.

        Returns:
            Layouts by name.
        """
        return {"total": Layout(dtype=torch.float32, shape=shape)}

    def encode(self, total: Tensor) -> dict[str, Tensor]:
        """Store a moment.

        Args:
            total: [in, in] or [in], float32.

        Returns:
            The moment itself.
        """
        return {"total": total}

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Read a moment.

        Args:
            stored: What `encode` returned.

        Returns:
            [in, in] or [in], float32.
        """
        return stored["total"]
