"""How a profile is collected, and of which weights."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safedelta_hf.errors import ConfigurationError, is_number, require_kind

ALL_LINEAR = "all-linear"

_Item = TypeVar("_Item", str, int)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """How data is read for a profile, of which weights, and where the moments are held meanwhile.

    Attributes:
        batch_size: Sequences per forward pass, at most; batches hold sequences of one length and no padding.
        max_length: Sequences are cut to this many tokens; None leaves them whole.
        moment_memory: Bytes (or "8GB") of moments to hold on the device at a time. None for what is free there; further
            moments then go to host memory while that has room, and then to mapped files.
        offload_folder: Where moments beyond that are memory-mapped. Without it they go to host memory if there is a
            limit, and else to the system's temporary folder.
        share_moments: Whether layers that read the same tensor share one moment.
        holdout: Share of the safety data to keep out of the moments, in [0, 1): rules with `strength="auto"` measure
            refusals by it. None for a quarter, of at least 16 examples that a transformers model reads, else nothing.
        targets: Which linear weights are profiled and adjusted: "all-linear"; names of modules or parameters as in
            PEFT, matched at their end; or a regular expression that matches whole names. What a `Treatment` says of
            uncovered parameters holds for the others.
        layers_to_transform: Numbers of the layers to choose from, as in PEFT; None for all.
        layers_pattern: What comes before a layer's number in names, such as "layers", as in PEFT; None for anything.

    Raises:
        ConfigurationError: A value is outside its range, or has no effect.
    """

    batch_size: int = 8
    max_length: int | None = None
    moment_memory: int | str | None = None
    offload_folder: str | Path | None = None
    share_moments: bool = True
    holdout: float | None = None
    targets: str | Sequence[str] = ALL_LINEAR
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        _require_count("batch_size", self.batch_size)
        if self.max_length is not None:
            _require_count("max_length", self.max_length)
        if not isinstance(self.share_moments, bool):
            raise ConfigurationError(f"share_moments={self.share_moments!r} must be True or False")
        if self.holdout is not None and not (is_number(self.holdout) and 0 <= self.holdout < 1):
            raise ConfigurationError(f"holdout={self.holdout!r} must be a share in [0, 1), such as 0.25")
        if self.offload_folder is not None:
            require_kind("ProfileConfig", "offload_folder", self.offload_folder, (str, Path), "a folder")
        self._require_targets()
        _ = self.budget  # what cannot be read is found now, not once training starts

    def _require_targets(self) -> None:
        for name in ("targets", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) or _is_list_of(str, value)):
                raise ConfigurationError(f"{name}={value!r} must be a text or a list of texts")
        layers = self.layers_to_transform
        if layers is not None and not (type(layers) is int or _is_list_of(int, layers)):
            raise ConfigurationError(f"layers_to_transform={layers!r} must be the number of a layer, or a list of such")
        if not self.targets:
            raise ConfigurationError(f"targets={self.targets!r} chooses nothing; the default is {ALL_LINEAR!r}")
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            _require_expression(self.targets, "targets")
            if self.layers_to_transform is not None:
                raise ConfigurationError(
                    f"layers_to_transform={self.layers_to_transform!r} does not go together with a regular expression "
                    f"(targets={self.targets!r}); put the layers into the expression, or give a list of names"
                )
        if self.layers_pattern is not None:
            if self.layers_to_transform is None:
                raise ConfigurationError(
                    f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform"
                )
            for pattern in _listed(self.layers_pattern):
                _require_expression(pattern, "layers_pattern")

    def targets_include(self, parameter: str) -> bool:
        """Whether a weight is profiled and adjusted, if it is a linear one: multiplied as a matrix, by whatever module.

        Args:
            parameter: Its canonical name. What is compared is that, or the name of its module.

        Returns:
            Whether it is.
        """
        module = parameter.rpartition(".")[0]
        return any(self._names(name) for name in (parameter, module)) and self._is_in_layers(parameter)

    def _names(self, name: str) -> bool:
        if self.targets == ALL_LINEAR:
            return True
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.targets)

    def _is_in_layers(self, parameter: str) -> bool:
        if self.layers_to_transform is None:
            return True
        for pattern in _listed(self.layers_pattern or r"[^.]*"):
            found = re.match(rf"(?:.*\.)?(?:{pattern})\.(\d+)\.", parameter)
            if found:
                return int(found.group(1)) in _listed(self.layers_to_transform)
        return False

    @property
    def budget(self) -> int | None:
        """The limit in bytes.

        Raises:
            ConfigurationError: It is no size.
        """
        if self.moment_memory is None:
            return None
        complaint = f'moment_memory={self.moment_memory!r} is no number of bytes, nor a size such as "8GB"'
        if isinstance(self.moment_memory, bool) or not isinstance(self.moment_memory, int | str):
            raise ConfigurationError(complaint)
        from accelerate.utils import convert_file_size_to_int  # takes seconds

        try:
            size = int(convert_file_size_to_int(self.moment_memory))
        except ValueError as error:
            raise ConfigurationError(complaint) from error
        if size < 0:
            raise ConfigurationError(complaint)
        return size


def _require_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")


def _is_list_of(kind: type, value: object) -> bool:
    if isinstance(value, bytes | Mapping) or not isinstance(value, Collection):
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _listed(value: _Item | Sequence[_Item]) -> Sequence[_Item]:
    return [value] if isinstance(value, str | int) else value


def _require_expression(expression: str, setting: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigurationError(f"{setting}={expression!r} is no regular expression ({error})") from error
