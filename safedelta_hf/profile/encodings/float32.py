"""A moment as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.profile.encodings.encoding import Encoding, Layout


@dataclass(frozen=True)
class Float32(Encoding):
    """All entries, exactly; of the diagonal kind too."""

    name: ClassVar[str] = "float32"

    @override
    def layouts(self, shape: tuple[int, ...]) -> Mapping[str, Layout]:
        return {"total": Layout(dtype=torch.float32, shape=shape)}

    @override
    def encode(self, total: Tensor) -> dict[str, Tensor]:
        return {"total": total}

    @override
    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["total"]
