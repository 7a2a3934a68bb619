"""A model, how this process holds it, and the processes that hold the rest."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safedelta_hf.names import parameter_names
from safedelta_hf.ranks import Ranks
from safedelta_hf.sharding.detect import holding_of
from safedelta_hf.sharding.holding import Holding, Piece


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
