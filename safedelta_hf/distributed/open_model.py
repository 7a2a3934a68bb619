"""Which backend holds a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from safedelta_hf.distributed.fsdp1 import FlatShardedParameters
from safedelta_hf.distributed.fsdp2 import FullyShardedParameters
from safedelta_hf.distributed.model import Holding, Piece, WholeParameters
from safedelta_hf.distributed.offload import OffloadedParameters
from safedelta_hf.distributed.offload_hooks import is_offloaded
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.distributed.zero import MirroredParameters, PartitionedParameters
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.names import parameter_names

BACKENDS: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Holding]], ...] = (
    (lambda model: any(isinstance(module, FSDPModule) for module in model.modules()), FullyShardedParameters),
    (lambda model: any(isinstance(m, FullyShardedDataParallel) for m in model.modules()), FlatShardedParameters),
    (lambda model: any(hasattr(parameter, "ds_id") for parameter in model.parameters()), PartitionedParameters),
    (lambda model: any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters()), MirroredParameters),
    (is_offloaded, OffloadedParameters),
)
"""How to tell a backend, and what holds its parameters; the first that fits, else they are whole."""


def holding_of(model: nn.Module) -> Holding:
    """How this process holds the parameters of a model.

    Args:
        model: As the Trainer passes it to callbacks.

    Returns:
        The holding.

    Raises:
        ConfigurationError: It is distributed in a way that is not covered.
    """
    for fits, holding in BACKENDS:
        if fits(model):
            return holding(model)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigurationError(
            f"{type(model).__name__}: its weights are distributed by tensor parallelism (a tp_plan), where a rank "
            "holds slices of inputs or outputs; this is not covered. Train without the callback, then use "
            "adjust_checkpoint on the saved model"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            f"{type(model).__name__}: some of its weights are on the meta device, and nothing that is known "
            "keeps their values; load it with values"
        )
    return WholeParameters(model)


@dataclass(frozen=True)
class HeldModel:
    """A model in the memory of one process or of many.

    Attributes:
        model: The model.
        holding: How this process holds its parameters.
        ranks: The processes of the run.
        names: Canonical names of the parameters of the bare model, without those of adapters.
    """

    model: nn.Module
    holding: Holding
    ranks: Ranks
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "HeldModel":
        """Find out how a model is held; all ranks of a run come here together.

        Args:
            model: As the Trainer passes it to callbacks.

        Returns:
            The model with what there is to know.

        Raises:
            ConfigurationError: It is distributed in a way that is not covered.
        """  # noqa: DOC502 - raised by the function called
        ranks = Ranks.of_run()
        with ranks.together():
            holding = holding_of(model)
        return cls(model, holding, ranks, tuple(parameter_names(model).values()))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole parameters, by name."""
        return {name: tuple(self.holding.shape(name)) for name in self.names}

    @property
    def data_types(self) -> dict[str, str]:
        """Data types of the parameters, such as "bfloat16", by name."""
        return {name: str(self.holding.dtype(name)).removeprefix("torch.") for name in self.names}

    def parameter(self, name: str) -> "HeldParameter":
        """One parameter, to be read and replaced.

        Args:
            name: Its name; of an adapter's, the one in the model.

        Returns:
            The parameter.
        """
        return HeldParameter(self.holding, name)


@dataclass(frozen=True)
class HeldParameter:
    """This process's part of a parameter.

    Attributes:
        holding: Holds it.
        name: Its name there.
        lent: Whether it is replaced for a while only.
    """

    holding: Holding
    name: str
    lent: bool = False

    @property
    def piece(self) -> Piece:
        """Which part that is."""
        return self.holding.piece(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameter."""
        return self.holding.dtype(self.name)

    def read(self) -> Tensor:
        """The part.

        Returns:
            A plain tensor; maybe the parameter's own memory, so not to be changed.
        """
        return self.holding.read(self.name)

    def write(self, value: Tensor) -> None:
        """Replace the part.

        Args:
            value: Of its shape.
        """
        replace = self.holding.lend if self.lent else self.holding.write
        replace(self.name, value)


@dataclass(frozen=True)
class LooseTensor:
    """A tensor that belongs to no parameter of a model, whole in this process.

    Attributes:
        tensor: The tensor.
    """

    tensor: Tensor

    @property
    def piece(self) -> Piece:
        """All of it."""
        return Piece.whole(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the tensor."""
        return self.tensor.dtype

    def read(self) -> Tensor:
        """The tensor.

        Returns:
            Its own memory.
        """
        return self.tensor.detach()

    def write(self, value: Tensor) -> None:
        """Replace it.

        Args:
            value: Of its shape.
        """
        with torch.no_grad():
            self.tensor.copy_(value)
