"""Which linear weights are adjusted, chosen by name as in PEFT."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from re import Pattern
from typing import TypeVar

from safedelta_hf.errors import ConfigurationError

ALL_LINEAR = "all-linear"

_Item = TypeVar("_Item", str, int)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """A choice of linear weights: everything that is multiplied as a matrix, experts and convolutions included.

    Names are those of modules, or of parameters where a module holds several.

    Attributes:
        names: "all-linear"; a regular expression that has to match a whole name; or a sequence of names, each of which
            chooses what is called so or ends in it after a dot.
        layers_to_transform: Numbers of the layers to choose from, or None for all.
        layers_pattern: What comes before the layer's number in a name, such as "layers" or "h"; None for anything.

    Raises:
        ConfigurationError: A regular expression is none, or settings do not go together.
    """

    names: str | Sequence[str] = ALL_LINEAR
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigurationError(f"targets={self.names!r} chooses nothing; the default is {ALL_LINEAR!r}")
        if self._is_expression:
            _compiled(str(self.names), "targets")
            if self.layers_to_transform is not None:
                raise ConfigurationError(
                    f"layers_to_transform={self.layers_to_transform!r} does not go together with a regular expression "
                    f"(targets={self.names!r}); put the layers into the expression, or give a list of names"
                )
        if self.layers_pattern is not None:
            if self.layers_to_transform is None:
                raise ConfigurationError(
                    f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform"
                )
            for pattern in _listed(self.layers_pattern):
                _compiled(pattern, "layers_pattern")

    def include(self, parameter: str) -> bool:
        """Whether a weight is chosen.

        Args:
            parameter: Its canonical name.

        Returns:
            Whether it is.
        """
        module = parameter.rpartition(".")[0]
        return any(self._chooses(name) for name in (parameter, module)) and self._is_in_layers(parameter)

    @property
    def _is_expression(self) -> bool:
        return isinstance(self.names, str) and self.names != ALL_LINEAR

    def _chooses(self, name: str) -> bool:
        if self.names == ALL_LINEAR:
            return True
        if isinstance(self.names, str):
            return re.fullmatch(self.names, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.names)

    def _is_in_layers(self, parameter: str) -> bool:
        if self.layers_to_transform is None:
            return True
        for pattern in _listed(self.layers_pattern or r"[^.]*"):
            found = re.match(rf"(?:.*\.)?(?:{pattern})\.(\d+)\.", parameter)
            if found:
                return int(found.group(1)) in _listed(self.layers_to_transform)
        return False


def _listed(value: _Item | Sequence[_Item]) -> Sequence[_Item]:
    return [value] if isinstance(value, str | int) else value


def _compiled(expression: str, setting: str) -> Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigurationError(f"{setting}={expression!r} is no regular expression ({error})") from error
