"""A base and a fine-tuned checkpoint of one model, matched by name, shape and type from headers alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.weights.readers import tied_aliases
from safedelta_hf.weights.safetensors_files import FLOATING, SafetensorsFiles
from safedelta_hf.weights.stored import StoredWeights, stored_in


class CheckpointPair:
    """The weights of a fine-tuned checkpoint, and where the same parameters stand in its base.

    Args:
        base: Files of the base.
        tuned: Files of the fine-tuned model.
        header: What the profile of the base was made from.

    Raises:
        CheckpointError: The fine-tuned weights are not those of the profile's model, or cannot be read as numbers.
        BaseWeightsError: The same of the base, or a weight has another shape there.
    """

    def __init__(self, base: SafetensorsFiles, tuned: SafetensorsFiles, header: ProfileHeader) -> None:
        self._tuned = tuned
        _require_plain(header)
        self.aliases = tied_aliases(header)
        self.stored = stored_in(tuned, header, self.aliases)
        self.shapes = {name: stored.shape for name, stored in self.stored.items()}
        known = {one for stored in self.stored.values() for one in stored.names}
        self.others = {name: tensor for name, tensor in tuned.tensors.items() if name not in known}
        try:
            in_base = stored_in(base, header, self.aliases)
        except CheckpointError as error:
            raise BaseWeightsError(f"base: {error}") from error
        for name, stored in in_base.items():
            if stored.shape != self.shapes[name]:
                raise BaseWeightsError(
                    f"{name}: {list(self.shapes[name])} in {tuned.source!r}, {list(stored.shape)} in the base "
                    f"{base.source!r}; was the vocabulary resized after the profile was made?"
                )
        self._require_known(base, header)
        self.base = StoredWeights(base, in_base)

    def read(self, name: str) -> Tensor:
        """Read the fine-tuned weight of a parameter.

        Args:
            name: Canonical name.

        Returns:
            The weight in host memory, in the dtype of its file.

        Raises:
            CheckpointError: It cannot be read, or a tied weight that is stored twice differs.
        """
        stored = self.stored[name]
        weight = stored.read(self._tuned)
        for twin in stored.twins:
            if not torch.equal(self._tuned.read(twin), weight):
                raise CheckpointError(
                    f"{name}: tied in the profile's model and stored in {self._tuned.source!r} as "
                    f"{' and '.join(stored.names)}, which differ; collect a profile of a base whose weights are not "
                    "tied, or save the model tied"
                )
        return weight

    def split(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that hold a parameter in files, under every name.

        Args:
            name: Canonical name.
            weight: What it shall be, contiguous.

        Yields:
            Name as in the files, and value.
        """
        stored = self.stored[name]
        yield from stored.split(weight)
        for twin in stored.twins:
            yield twin, weight

    def _require_known(self, base: SafetensorsFiles, header: ProfileHeader) -> None:
        for name, tensor in self.others.items():
            if name not in base.tensors or base.tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{name}: in {self._tuned.source!r}, and no parameter of the {header.architecture} that the "
                    f"profile was made for, nor as such in the base {base.source!r}; was it trained? Collect a profile "
                    "of a base that has it, or remove it from the files"
                )


def _require_plain(header: ProfileHeader) -> None:
    if header.parametrised:
        name, originals = next(iter(header.parametrised.items()))
        raise CheckpointError(
            f"{name}: computed from {', '.join(originals)} by a parametrisation, which takes the model in memory; use "
            "adjust_model"
        )
    for name, dtype in header.dtypes.items():
        if name in header.packed or getattr(torch, dtype, None) not in FLOATING.values():
            raise CheckpointError(
                f"{name}: the profile was made of a base that holds it as {dtype}, whose entries cannot be read as "
                "numbers; collect a profile of the base as it was before it was quantised"
            )
