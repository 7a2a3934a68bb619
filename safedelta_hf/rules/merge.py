"""The other kind of rule: it merges a fine-tuned weight with its base, and with those of further models."""

import hashlib
from abc import abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn
from typing_extensions import override

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.rules.rule import AutoStrength, Rule, number


class WeightReader(Protocol):
    """Reads the weights of a further model, one at a time."""

    @property
    def source(self) -> str:
        """Where they come from."""
        ...

    def read(self, name: str) -> Tensor:
        """The weight of a canonical name."""
        ...


Source = nn.Module | str | Path | WeightReader
"""A further model: in memory; a folder or cached repository of a model, or the folder of a LoRA; or an open reader."""


@dataclass(frozen=True, kw_only=True)
class MergeInput:
    """What a merge may know of one parameter; every tensor is float32, in the shape of the parameter.

    Attributes:
        name: Canonical name.
        base: Base weight.
        delta: Fine-tuned minus base weight.
        others: Weight of each further model minus base weight, in the order of the rule's `sources`.
        is_transposed: Whether its matrices are stored with their inputs first.
        is_stack: Whether it is a stack of matrices, such as experts, along its first dimension.
    """

    name: str
    base: Tensor
    delta: Tensor
    others: tuple[Tensor, ...] = ()
    is_transposed: bool = False
    is_stack: bool = False

    def matrices(self, values: Tensor) -> Tensor:
        """Lay out a tensor of the parameter's shape with outputs first.

        Args:
            values: In the shape of the parameter.

        Returns:
            [out, in], or [stack, out, in]. Where inputs do not mix (norm scales, biases) it has one column.
        """
        if values.ndim == 1:
            return values[:, None]
        matrix = values if self.is_stack else values.flatten(1)
        return matrix.mT if self.is_transposed else matrix


class Merged(NamedTuple):
    """What a merge keeps of a delta.

    Attributes:
        values: `D*`, float32, in the shape of the parameter.
        notes: What the report should say of it.
    """

    values: Tensor
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MergeRule(Rule):
    """Merges weights without a look at the safety data's moments, which only measure the result in the report.

    It needs base and fine-tuned weight whole, and may give a delta of any rank: models in memory have room for that,
    the factors of an adapter have not.

    Args:
        strength: How much is given up; 0 returns the fine-tuned weights. "auto" measures.
    """

    mildest: ClassVar[float] = 0.0
    factors_serve_any_strength: ClassVar[bool] = True
    reads_moments: ClassVar[bool] = False
    needs_dense: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[Source, ...]:
        """Further models whose weights it reads."""
        return ()

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @abstractmethod
    def merged(self, parameter: MergeInput) -> Merged:
        """Merge one parameter.

        Args:
            parameter: Its weights.

        Returns:
            What is kept of its delta.
        """

    @property
    def _share(self) -> float:
        return 1 / (1 + number(self.strength))


def own_seed(seed: int, name: str) -> int:
    """Seed of what is drawn for one parameter, whatever is drawn for others.

    Args:
        seed: Of the rule.
        name: Canonical name of the parameter, or more.

    Returns:
        A number of 64 bits.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def source_name(source: Source) -> str:
    """What a further model is called in reports and errors.

    Args:
        source: The model.

    Returns:
        Its path, or what it is.
    """
    if isinstance(source, str | Path):
        return str(source)
    return f"a {type(source).__name__} in memory" if isinstance(source, nn.Module) else source.source


def require_source(owner: str, field: str, source: object, needs: str) -> None:
    """Make sure that a further model of a rule is one.

    Args:
        owner: Class of the rule.
        field: Which of its settings names the model.
        source: What was given.
        needs: What the rule needs, in words.

    Raises:
        ConfigurationError: It is no model, folder or reader.
    """
    if not isinstance(source, nn.Module | str | Path) and not (hasattr(source, "read") and hasattr(source, "source")):
        raise ConfigurationError(f"{owner}: {field}={source!r} is no model, folder or reader of weights; {needs}")


def require_others(owner: str, others: object, needs: str) -> tuple[Source, ...]:
    """Make sure that the further fine-tuned models of a rule are such.

    Args:
        owner: Class of the rule.
        others: What was given.
        needs: What the rule needs, in words.

    Returns:
        The models.

    Raises:
        ConfigurationError: It is no list of models, folders or readers.
    """
    if not isinstance(others, list | tuple):
        raise ConfigurationError(f"{owner}: others={others!r} is no list; {needs}")
    for place, source in enumerate(others):
        require_source(owner, f"others[{place}]", source, needs)
    return tuple(others)


def _plain(value: Any) -> Any:  # noqa: ANN401 - any field of a rule
    if isinstance(value, AutoStrength):
        return asdict(value)
    if isinstance(value, tuple):
        return [source_name(source) for source in value]
    return value if isinstance(value, bool | int | float | None) else source_name(value)
