"""The base weights, wherever they can be read: files, a model, or a copy in host memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from safedelta_hf.distributed.model import Piece
from safedelta_hf.distributed.open_model import HeldModel, holding_of
from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.modules.names import parameter_aliases, parameter_names
from safedelta_hf.weights.digest import digest, digest_of_piece
from safedelta_hf.weights.safetensors_files import TensorFiles


class BaseWeights(Protocol):
    """Reads one base weight at a time."""

    @property
    def source(self) -> str:
        """Where the weights come from, for the report."""
        ...

    @property
    def reopen(self) -> Mapping[str, str | None] | None:
        """Name or path, and revision, of files that hold all of the weights; None if there are none."""
        ...

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """The base weight of a canonical name, in the dtype of its file or model; a piece of it if one is named."""
        ...


class ModelBase:
    """Base weights in a model that stays in memory.

    Args:
        model: The base model; it must not be trained meanwhile.
    """

    source = "a model in memory"
    reopen = None

    def __init__(self, model: nn.Module) -> None:
        self._holding = holding_of(model)
        self._names = frozenset(parameter_names(model).values())

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """The base weight of a canonical name.

        Args:
            name: Canonical parameter name.
            piece: The slices that are wanted; None for all.

        Returns:
            The parameter's own storage; not to be written to.

        Raises:
            BaseWeightsError: The base model has no such parameter, or this process does not hold what is wanted of it.
        """
        if name not in self._names:
            raise BaseWeightsError(f"{name}: the base model has no such parameter; pass the model that was fine-tuned")
        weight, own = self._holding.read(name), self._holding.piece(name)
        wanted = own if piece is None or piece.is_whole else piece
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
        return weight[wanted.start : wanted.stop]


class CheckpointBase:
    """Base weights in safetensors files, read one at a time.

    Args:
        name_or_path: A folder, or a repository already in the local Hub cache.
        aliases: Other names under which a parameter may stand in the files, by canonical name.
        revision: Revision in the Hub cache.

    Raises:
        BaseWeightsError: There are no safetensors files, or they are malformed.
    """

    def __init__(
        self, name_or_path: str | Path, aliases: Mapping[str, tuple[str, ...]], revision: str | None = None
    ) -> None:
        self.source = str(name_or_path)
        self.reopen = {"source": self.source, "revision": revision}
        self._aliases = aliases
        try:
            self._files = TensorFiles(self.source, revision)
        except CheckpointError as error:
            raise BaseWeightsError(f"base: {error}") from error

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """The base weight of a canonical name.

        Args:
            name: Canonical parameter name.
            piece: The slices that are wanted, and read; None for all.

        Returns:
            A new tensor in host memory, in the dtype of the file.

        Raises:
            BaseWeightsError: No file has it, or the file cannot be read.
        """
        for candidate in self._candidates(name):
            if candidate in self._files.tensors:
                try:
                    if piece is None or piece.is_whole:
                        return self._files.read(candidate)
                    self._require_size(candidate, piece)
                    return self._files.read(candidate, (piece.start, piece.stop))
                except CheckpointError as error:
                    raise BaseWeightsError(f"base: {error}") from error
        raise BaseWeightsError(
            f"{name}: not in the safetensors files of {self.source!r}; pass base=<a model in memory>"
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
            candidate in self._files.tensors and self._files.tensors[candidate].shape == tuple(shape)
            for candidate in self._candidates(name)
        )

    def _require_size(self, stored: str, piece: Piece) -> None:
        shape = self._files.tensors[stored].shape
        if shape[:1] != (piece.size,):
            raise BaseWeightsError(
                f"{stored}: {list(shape)} in {self.source!r}, {piece.size} slices in the model; was the "
                "vocabulary resized?"
            )

    def _candidates(self, name: str) -> Iterator[str]:
        yield name
        yield from self._aliases.get(name, ())


class FilesOrMemoryBase:
    """Base weights that stand in files where they can be read again, and copies of the others.

    Args:
        held: The base model as it is now; each process copies the pieces that it holds, and of parameters that all of
            them hold whole its share. All of them read the same weights in the same order.
        digests: Digest of each of its parameters.
        revision: Revision in the Hub cache.
        avoid: Folder whose files may be overwritten by the training, and so are not relied on.
    """

    def __init__(
        self, held: HeldModel, digests: Mapping[str, str], *, revision: str | None, avoid: Path | None
    ) -> None:
        files = _usable_files(held.model, revision, avoid)
        self._files = files if held.ranks.all(files is not None) else None
        self._ranks = held.ranks
        self._keepers: dict[str, int | None] = {}
        self._memory: dict[str, Tensor] = {}
        for name in held.names:
            trained = held.holding.parameter(name).requires_grad
            if trained and not (self._files and self._is_in(self._files, held, name, digests[name])):
                self._keep(name, held.holding.read(name), whole=held.holding.piece(name).is_whole)

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the weights that are held as copies."""
        return tuple(self._keepers)

    @property
    def reopen(self) -> Mapping[str, str | None] | None:
        """The files, unless a copy was needed."""
        return None if self._files is None or self._keepers else self._files.reopen

    @property
    def source(self) -> str:
        """Where the weights come from."""
        copies = f"{len(self._keepers)} weights copied to host memory at train start"
        if self._files is None:
            return copies
        return f"{self._files.source}, {copies}" if self._keepers else self._files.source

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """The base weight of a canonical name.

        Args:
            name: Canonical parameter name.
            piece: The slices that are wanted, as the model was held when training started; None for all.

        Returns:
            The weight in host memory; not to be written to.

        Raises:
            BaseWeightsError: It was frozen when training started and is in no file.
        """
        if name in self._keepers:
            own, keeper = self._memory.get(name), self._keepers[name]
            weight = own if keeper is None else self._ranks.broadcast(own, keeper)
            assert weight is not None, "its keeper has it"
            return weight
        if self._files is None:
            raise BaseWeightsError(
                f"{name}: was frozen at train start, so no copy was kept; pass base=<the base model>"
            )
        return self._files.read(name, piece)

    def _keep(self, name: str, weight: Tensor, *, whole: bool) -> None:
        # What each process holds whole, one of them keeps for all, in turn.
        keeper = len(self._keepers) % self._ranks.size if whole else None
        self._keepers[name] = keeper
        if keeper in (None, self._ranks.rank):
            self._memory[name] = weight.to("cpu", copy=True)

    def _is_in(self, files: "CheckpointBase", held: HeldModel, name: str, expected: str) -> bool:
        if not held.ranks.all(files.has(name, held.holding.shape(name))):
            return False
        piece = held.holding.piece(name)
        rows = files.read(name, piece).to(held.holding.dtype(name))
        return digest_of_piece(rows, held.holding.shape(name), piece, held.ranks) == expected


def verified(base: BaseWeights, name: str, dtype: str, expected: str, held: HeldModel | None = None) -> Tensor:
    """Read a base weight and make sure that it is the one that was meant.

    Args:
        base: Where to read.
        name: Canonical parameter name.
        dtype: Data type in which the digest was taken, such as "bfloat16".
        expected: Digest of the weight in that data type.
        held: The fine-tuned model, if only the piece of it that this process holds is wanted.

    Returns:
        The weight, or that piece of it, in that data type.

    Raises:
        BaseWeightsError: It is another weight.
    """
    if held is None:
        weight = base.read(name).to(getattr(torch, dtype))
        found = digest(weight)
    else:
        piece = held.holding.piece(name)
        weight = base.read(name, piece).to(getattr(torch, dtype))
        found = digest_of_piece(weight, held.holding.shape(name), piece, held.ranks)
    if found != expected:
        raise BaseWeightsError(
            f"{name}: the weight in {base.source} is not that of the base model whose safety profile is used; "
            "were the files changed since? Pass base=<the model that the profile was made of>"
        )
    return weight


def open_base(base: nn.Module | str | Path, model: nn.Module, revision: str | None = None) -> BaseWeights:
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
        return CheckpointBase(base, parameter_aliases(model), revision)
    if not set(parameter_names(base)).isdisjoint(parameter_names(model)):
        raise BaseWeightsError(
            "base: it shares its weights with the fine-tuned model; pass a copy made before training, or the folder "
            "that the model was loaded from"
        )
    return ModelBase(base)


def _usable_files(model: nn.Module, revision: str | None, avoid: Path | None) -> CheckpointBase | None:
    config = getattr(model, "config", None)
    name_or_path = getattr(config, "_name_or_path", "")
    if not name_or_path or (avoid is not None and Path(name_or_path).resolve() == avoid.resolve()):
        return None
    try:
        return CheckpointBase(name_or_path, parameter_aliases(model), revision)
    except BaseWeightsError:
        return None
