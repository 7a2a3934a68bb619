"""Weights wherever they can be read, one at a time: a model in memory, files, or copies in host memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

import torch
import transformers
from torch import Tensor, nn
from typing_extensions import override

from safedelta_hf.distributed.model import Parameter, Shard, ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.modules.names import parameter_aliases, parameter_names, wrapping_told
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.weights.digest import digest_of_held
from safedelta_hf.weights.safetensors_files import SafetensorsFiles


class WeightReader(Protocol):
    """Reads the weights of one model, one at a time."""

    @property
    def source(self) -> str:
        """Where the weights come from, for the report."""
        ...

    def holds(self, name: str) -> bool:
        """Whether there is a weight of a canonical name.

        Args:
            name: Canonical parameter name.

        Returns:
            Whether it can be read.
        """
        ...

    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        """The weight of a canonical name, or a shard of it.

        Args:
            name: Canonical parameter name.
            shard: What is wanted of it; None for all.

        Returns:
            A tensor in the dtype of the file or model; not to be written to.

        Raises:
            BaseWeightsError: There is no such weight, or it cannot be read, or has another number of slices.
        """
        ...


class ModelReader(WeightReader):
    """Weights of a model that stays in memory.

    Args:
        model: The model; it must not be trained meanwhile.
    """

    source = "a model in memory"

    def __init__(self, model: nn.Module) -> None:
        self._model = open_model(model)
        self._names = frozenset(self._model.names)

    @override
    def holds(self, name: str) -> bool:
        return name in self._names

    @override
    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        if name not in self._names:
            raise BaseWeightsError(f"{name}: the base model has no such parameter; pass the model that was fine-tuned")
        weight, own = self._model.read(name), self._model.shard(name)
        wanted = own if shard is None or shard.is_whole else shard
        if (own.start, own.stop) == (wanted.start, wanted.stop):
            return weight
        if not own.is_whole:
            raise BaseWeightsError(
                f"{name}: the base model is sharded in another way than the tuned one; pass the folder of its files"
            )
        if weight.shape[0] != wanted.size:
            raise BaseWeightsError(
                f"{name}: {weight.shape[0]} slices in the base model, {wanted.size} in the fine-tuned one; was the "
                "vocabulary resized?"
            )
        return wanted.of(weight)


class FilesReader(WeightReader):
    """Weights in safetensors files, read into host memory.

    Args:
        name_or_path: A folder, or a repository already in the local Hub cache.
        aliases: Other names under which a parameter may stand in the files, by canonical name.
        revision: Revision in the Hub cache.

    Attributes:
        revision: The same.

    Raises:
        BaseWeightsError: There are no safetensors files, or they are malformed.
    """

    def __init__(
        self, name_or_path: str | Path, aliases: Mapping[str, tuple[str, ...]], revision: str | None = None
    ) -> None:
        self.revision = revision
        self._source = str(name_or_path)
        self._aliases = aliases
        try:
            self._files = SafetensorsFiles(self._source, revision)
        except CheckpointError as error:
            raise BaseWeightsError(f"base: {error}") from error

    @property
    @override
    def source(self) -> str:
        return self._source

    @override
    def holds(self, name: str) -> bool:
        return any(stored in self._files.tensors for stored in self._candidates(name))

    @override
    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        for stored in self._candidates(name):
            if stored in self._files.tensors:
                try:
                    if shard is None or shard.is_whole:
                        return self._files.read(stored)
                    self._require_size(stored, shard)
                    return self._files.read(stored, (shard.start, shard.stop))
                except CheckpointError as error:
                    raise BaseWeightsError(f"base: {error}") from error
        raise BaseWeightsError(
            f"{name}: not in the safetensors files of {self.source!r}; pass base=<a model in memory>"
            f"{wrapping_told(self._files.tensors, {name})}"
        )

    def has(self, name: str, shape: torch.Size) -> bool:
        """Whether a weight stands in the files in a certain shape.

        Args:
            name: Canonical parameter name.
            shape: The shape.

        Returns:
            Whether it does.
        """
        return any(
            stored in self._files.tensors and self._files.tensors[stored].shape == tuple(shape)
            for stored in self._candidates(name)
        )

    def _require_size(self, stored: str, shard: Shard) -> None:
        shape = self._files.tensors[stored].shape
        if shape[:1] != (shard.size,):
            raise BaseWeightsError(
                f"{stored}: {list(shape)} in {self.source!r}, {shard.size} slices in the model; was the "
                "vocabulary resized?"
            )

    def _candidates(self, name: str) -> Iterator[str]:
        yield name
        yield from self._aliases.get(name, ())


class FilesOrCopies(WeightReader):
    """Weights of a model as it is now: in files where they can be read again, and copies of the others.

    Args:
        model: The base model; each process copies the shards that it holds, and of parameters that all of them hold
            whole its share. All of them read the same weights in the same order.
        digests: Digest of each of its parameters.
        revision: Revision in the Hub cache.
        avoid: Folder whose files may be overwritten by the training, and so are not relied on.
    """

    def __init__(
        self, model: ShardedModel, digests: Mapping[str, str], *, revision: str | None, avoid: Path | None
    ) -> None:
        files = _usable_files(model.model, revision, avoid)
        self._files = files if model.ranks.all(files is not None) else None
        self._ranks = model.ranks
        self._keepers: dict[str, int | None] = {}
        self._copies: dict[str, Tensor] = {}
        for name in model.names:
            trained = model.live(name).requires_grad
            if trained and not (self._files and _is_in(self._files, model.parameter(name), digests[name])):
                self._keep(model.parameter(name))

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the weights that are held as copies."""
        return tuple(self._keepers)

    @property
    def files(self) -> FilesReader | None:
        """The files, if they hold all of the weights."""
        return None if self._keepers else self._files

    @property
    @override
    def source(self) -> str:
        copies = f"{len(self._keepers)} weights copied to host memory at train start"
        if self._files is None:
            return copies
        return f"{self._files.source}, {copies}" if self._keepers else self._files.source

    @override
    def holds(self, name: str) -> bool:
        return name in self._keepers or (self._files is not None and self._files.holds(name))

    @override
    def read(self, name: str, shard: Shard | None = None) -> Tensor:
        if name in self._keepers:
            own, keeper = self._copies.get(name), self._keepers[name]
            weight = own if keeper is None else self._ranks.broadcast(own, keeper)
            assert weight is not None, "its keeper has it"
            return weight
        if self._files is None:
            raise BaseWeightsError(
                f"{name}: was frozen at train start, so no copy was kept; pass base=<the base model>"
            )
        return self._files.read(name, shard)

    def _keep(self, parameter: Parameter) -> None:
        # What each process holds whole, one of them keeps for all, in turn.
        weight = parameter.read()
        keeper = len(self._keepers) % self._ranks.size if parameter.shard.is_whole else None
        self._keepers[parameter.name] = keeper
        if keeper in (None, self._ranks.rank):
            self._copies[parameter.name] = weight.to("cpu", copy=True)


def verified(reader: WeightReader, name: str, dtype: str, expected: str, model: ShardedModel | None = None) -> Tensor:
    """Read a base weight and make sure that it is the one that was meant.

    Args:
        reader: Where to read.
        name: Canonical parameter name.
        dtype: Data type in which the digest was taken, such as "bfloat16".
        expected: Digest of the weight in that data type.
        model: The fine-tuned model, if only what this process holds of it is wanted.

    Returns:
        The weight, or that shard of it, in that data type.

    Raises:
        BaseWeightsError: It is another weight.
    """
    weight = _read(reader, name, model).to(getattr(torch, dtype))
    if digest_of_held(weight, name, model) != expected:
        refuse(reader, name)
    return weight


def base_digest(reader: WeightReader, name: str, model: ShardedModel) -> str:
    """Digest of a base weight in the data type that a model has.

    Args:
        reader: Where to read.
        name: Canonical parameter name.
        model: The model, of the same parameters; all its ranks call this.

    Returns:
        The digest of the whole.

    Raises:
        BaseWeightsError: It cannot be read.
    """
    return digest_of_held(reader.read(name, model.shard(name)).to(model.dtype(name)), name, model)


def refuse(reader: WeightReader, name: str) -> NoReturn:
    """Stop at a base weight that is not the profile's.

    Args:
        reader: Where it was read.
        name: Canonical parameter name.

    Raises:
        BaseWeightsError: It is another weight.
    """
    raise BaseWeightsError(
        f"{name}: the weight in {reader.source} is not that of the base model whose safety profile is used; "
        "were the files changed since? Pass base=<the model that the profile was made of>"
    )


class Comparison(NamedTuple):
    """Weights beside the digests of a profile.

    Attributes:
        compared: Number of weights that were compared; those that are not there, or are quantised in one of the two
            alone, tell nothing.
        differing: The first that is another weight, at which the comparison ended; None if all are the same.
    """

    compared: int
    differing: str | None


def compared(
    reader: WeightReader, header: ProfileHeader, model: ShardedModel | None = None, *, progress: bool = False
) -> Comparison:
    """Compare all weights that can be read with those that a profile was made of.

    Args:
        reader: Where to read.
        header: What the profile was made from.
        model: A model of the same parameters, if only what this process holds of each is read.
        progress: Whether to show a progress bar.

    Returns:
        What was found, alike on all ranks of that model.

    Raises:
        BaseWeightsError: A weight that is there cannot be read.
    """
    count = 0
    for name, expected in progress_bar(
        header.base.items(), desc="Comparing the base", unit="weight", disable=not progress
    ):
        if not reader.holds(name):
            continue
        weight = _read(reader, name, model)
        if is_quantised(weight) != (name in header.packed):
            continue
        weight = weight if name in header.packed else weight.to(getattr(torch, header.dtypes[name]))
        if digest_of_held(weight, name, model) != expected:
            return Comparison(count, name)
        count += 1
    return Comparison(count, None)


def require_unswapped(base: WeightReader, header: ProfileHeader, model: ShardedModel | None = None) -> None:
    """Make sure that a base is the profile's, once no weight of the fine-tuned model differs from the profile's base.

    Args:
        base: Reads the base.
        header: What the profile was made from.
        model: The fine-tuned model, if it is in memory.

    Raises:
        BaseWeightsError: It is not.
    """
    differing = compared(base, header, model).differing
    if differing is not None:
        raise BaseWeightsError(
            f"base: {base.source} and the fine-tuned model look swapped: every weight of the latter is that of the "
            f"model that the profile was made of, and {differing} in the former is not; give them the other way round "
            "(or, if the profile was made of the fine-tuned model, collect it again, of the base)"
        )


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


def open_base(base: nn.Module | str | Path, model: nn.Module, revision: str | None = None) -> WeightReader:
    """Open base weights that were given explicitly.

    Args:
        base: A model, or a folder or cached repository of safetensors files.
        model: The fine-tuned model, whose tied names are looked for too.
        revision: Revision in the Hub cache.

    Returns:
        A reader.

    Raises:
        BaseWeightsError: Base and fine-tuned model are the same object.
    """
    if not isinstance(base, nn.Module):
        return FilesReader(base, parameter_aliases(model), revision)
    if not set(parameter_names(base)).isdisjoint(parameter_names(model)):
        raise BaseWeightsError(
            "base: it shares its weights with the fine-tuned model; pass a copy made before training, or the folder "
            "that the model was loaded from"
        )
    return ModelReader(base)


def _read(reader: WeightReader, name: str, model: ShardedModel | None) -> Tensor:
    # All of a weight, or of a model the shard that this process holds.
    return reader.read(name, None if model is None else model.shard(name))


def _is_in(files: FilesReader, parameter: Parameter, expected: str) -> bool:
    model, name = parameter.model, parameter.name
    return model.ranks.all(files.has(name, model.shape(name))) and base_digest(files, name, model) == expected


def _usable_files(model: nn.Module, revision: str | None, avoid: Path | None) -> FilesReader | None:
    config = getattr(model, "config", None)
    name_or_path = getattr(config, "_name_or_path", "")
    if not name_or_path or (avoid is not None and Path(name_or_path).resolve() == avoid.resolve()):
        return None
    try:
        return FilesReader(name_or_path, parameter_aliases(model), revision)
    except BaseWeightsError:
        return None
