"""A base and a fine-tuned checkpoint of one model, matched by name, shape and type from headers alone."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor
from typing_extensions import override

from safedelta_hf.checkpoint.layout import StoredPiece, saved_layout, whole
from safedelta_hf.distributed.model import Shard
from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.records import ProfileHeader
from safedelta_hf.weights.readers import WeightReader
from safedelta_hf.weights.safetensors_files import FLOATING, SafetensorsFiles


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A parameter in files.

    Attributes:
        shape: Its shape.
        pieces: The tensors that hold it, together.
        twins: Further names under which the whole of it, being tied, is stored again.
    """

    shape: tuple[int, ...]
    pieces: tuple[StoredPiece, ...]
    twins: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors that hold it."""
        return (*(piece.name for piece in self.pieces), *self.twins)

    def read(self, files: SafetensorsFiles) -> Tensor:
        """Read it.

        Args:
            files: The files.

        Returns:
            A new tensor in host memory, in the dtype of the files.
        """
        if self.pieces == (whole(self.pieces[0].name, self.shape),):
            return files.read(self.pieces[0].name)
        weight = torch.empty(self.shape, dtype=FLOATING[files.tensors[self.pieces[0].name].dtype])
        for piece in self.pieces:
            piece.of(weight).copy_(files.read(piece.name))
        return weight


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
        self.stored = _found(tuned, header, self.aliases)
        self.shapes = {name: stored.shape for name, stored in self.stored.items()}
        known = {one for stored in self.stored.values() for one in stored.names}
        self.others = {name: tensor for name, tensor in tuned.tensors.items() if name not in known}
        try:
            in_base = _found(base, header, self.aliases)
        except CheckpointError as error:
            raise BaseWeightsError(f"base: {error}") from error
        for name, stored in in_base.items():
            if stored.shape != self.shapes[name]:
                raise BaseWeightsError(
                    f"{name}: {list(self.shapes[name])} in {tuned.source!r}, {list(stored.shape)} in the base "
                    f"{base.source!r}; was the vocabulary resized after the profile was made?"
                )
        self._require_known(base, header)
        self.base = PairedBase(base, in_base)

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

    def parts(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that hold a parameter in files.

        Args:
            name: Canonical name.
            weight: What it shall be, contiguous.

        Yields:
            Name as in the files, and value.
        """
        stored = self.stored[name]
        for piece in stored.pieces:
            yield piece.name, piece.of(weight)
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


class PairedBase(WeightReader):
    """Reads base weights that were found in files.

    Args:
        files: The files.
        stored: How each parameter stands there, by canonical name.
    """

    def __init__(self, files: SafetensorsFiles, stored: Mapping[str, Stored]) -> None:
        self._files, self._stored = files, stored

    @property
    @override
    def source(self) -> str:
        return self._files.source

    @override
    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        try:
            weight = self._stored[name].read(self._files)
        except CheckpointError as error:
            raise BaseWeightsError(f"base: {error}") from error
        return weight if shard is None else shard.of(weight)


def tied_aliases(header: ProfileHeader) -> dict[str, tuple[str, ...]]:
    """Other names under which the tied parameters of a model may stand in files, as its class tells them.

    Args:
        header: What the profile of the model was made from; names that are tied have one digest there.

    Returns:
        Names by canonical name, for those that have any; none if the class is not one of transformers.
    """
    model_class = getattr(transformers, header.architecture, None)
    targets = getattr(model_class, "_tied_weights_keys", None)
    groups: dict[str, list[str]] = {}
    for target, source in targets.items() if isinstance(targets, Mapping) else ():
        groups.setdefault(source, [source]).append(target)
    aliases = {}
    for group in groups.values():
        known = [name for name in group if name in header.base]
        if len(known) == 1:
            aliases[known[0]] = tuple(name for name in group if name not in header.base)
    return aliases


def _require_plain(header: ProfileHeader) -> None:
    if header.parametrised:
        name, originals = next(iter(header.parametrised.items()))
        raise CheckpointError(
            f"{name}: computed from {', '.join(originals)} by a parametrisation, which takes the model in memory; use "
            "adjust_model"
        )
    for name, dtype in header.dtypes.items():
        if getattr(torch, dtype, None) not in FLOATING.values():
            raise CheckpointError(
                f"{name}: the profile was made of a base that holds it as {dtype}, whose entries cannot be read as "
                "numbers; collect a profile of the base as it was before it was quantised"
            )


def _found(files: SafetensorsFiles, header: ProfileHeader, aliases: Mapping[str, tuple[str, ...]]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    layout: dict[str, Stored] | None = None
    for name in header.base:
        names = [one for one in (name, *aliases.get(name, ())) if one in files.tensors]
        if names:
            shape = files.tensors[names[0]].shape
            found[name] = Stored(shape=shape, pieces=(whole(names[0], shape),), twins=tuple(names[1:]))
        else:
            layout = layout or _layout(name, files, header)
            if name not in layout:
                raise CheckpointError(_absence(name, files, header))
            found[name] = layout[name]
            _require_covered(name, found[name], files, header)
        _require_readable(name, found[name], files, header)
    return found


def _layout(name: str, files: SafetensorsFiles, header: ProfileHeader) -> dict[str, Stored]:
    try:
        layout = saved_layout(files, header)
    except CheckpointError as error:
        raise CheckpointError(f"{_absence(name, files, header)}; {error}") from error
    return {name: Stored(shape=shape, pieces=pieces) for name, (shape, pieces) in layout.items()}


def _absence(name: str, files: SafetensorsFiles, header: ProfileHeader) -> str:
    strangers = _first(one for one in files.tensors if one not in header.base)
    found = f", which has {strangers} instead" if strangers else ""
    return (
        f"{name}: a parameter of the {header.architecture} that the profile was made for, and not in "
        f"{files.source!r}{found}. A quantised checkpoint cannot be adjusted; if transformers renames its weights when "
        "it loads them, load the model, save it with save_pretrained(..., save_original_format=False) and give that "
        "folder"
    )


def _require_covered(name: str, stored: Stored, files: SafetensorsFiles, header: ProfileHeader) -> None:
    count, covered = math.prod(stored.shape), sum(math.prod(piece.shape) for piece in stored.pieces)
    if not stored.pieces or covered != count:
        raise CheckpointError(
            f"{_absence(name, files, header)}; its layout is not known (transformers saves {covered} of its {count} "
            "entries)"
        )


def _require_readable(name: str, stored: Stored, files: SafetensorsFiles, header: ProfileHeader) -> None:
    for one in stored.names:
        if one not in files.tensors:
            raise CheckpointError(_absence(name, files, header))
    _require_floating(files, stored.names)
    shapes = dict.fromkeys(stored.twins, stored.shape) | {piece.name: piece.shape for piece in stored.pieces}
    for one, shape in shapes.items():
        if files.tensors[one].shape != shape:
            raise CheckpointError(
                f"{name}: {one} is {list(files.tensors[one].shape)} in {files.source!r} and should be {list(shape)}; "
                "give a model as it was saved, with its own config.json"
            )
    if len(types := sorted({files.tensors[one].dtype for one in stored.names})) > 1:
        raise CheckpointError(
            f"{name}: its parts are stored as {' and '.join(types)} in {files.source!r}; save the model in one type"
        )


def _require_floating(files: SafetensorsFiles, names: Collection[str]) -> None:
    for name in names:
        if (dtype := files.tensors[name].dtype) not in FLOATING:
            raise CheckpointError(
                f"{name}: stored as {dtype} in {files.source!r}; only {', '.join(FLOATING)} are read as numbers, so "
                "give the model as it was before it was quantised"
            )


def _first(names: Iterable[str], most: int = 2) -> str:
    return ", ".join(name for name, _ in zip(names, range(most), strict=False))
