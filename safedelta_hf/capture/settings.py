"""How a profile is collected."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import convert_file_size_to_int

from safedelta_hf.capture.targets import ALL_LINEAR, Targets
from safedelta_hf.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """How the safety data is read and where the moments are held.

    Attributes:
        batch_size: Sequences per forward pass, at most.
        max_length: Sequences are cut to this many tokens; None leaves them whole.
        moment_memory: Bytes (or "8GB") of moments to hold on the device at a time; None for no limit.
        offload_folder: Where moments beyond that limit are memory-mapped; None for host memory.
        share_moments: Whether layers that read the same tensor share one moment.
        holdout: Share of the safety data kept out of the moments, to measure refusals by; None for a quarter where
            there is enough of it.
        targets: Which linear weights are profiled and adjusted: "all-linear", names as in PEFT, or a regular
            expression.
        layers_to_transform: Numbers of the layers to choose from, as in PEFT; None for all.
        layers_pattern: What comes before a layer's number in names, as in PEFT.

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
        for name in ("batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
        if self.holdout is not None and not (isinstance(self.holdout, int | float) and 0 <= self.holdout < 1):
            raise ConfigurationError(f"holdout={self.holdout!r} must be a share in [0, 1), such as 0.25")
        if self.offload_folder is not None and self.moment_memory is None:
            raise ConfigurationError(
                f"offload_folder={str(self.offload_folder)!r} has no effect without a limit; pass moment_memory too, "
                'such as "8GB"'
            )
        _ = self.budget, self.chosen  # what cannot be read is found now, not once training starts

    @property
    def chosen(self) -> Targets:
        """The linear weights that are profiled and adjusted.

        Raises:
            ConfigurationError: The settings choose nothing or do not go together.
        """  # noqa: DOC502 - raised by the class
        return Targets(
            names=self.targets, layers_to_transform=self.layers_to_transform, layers_pattern=self.layers_pattern
        )

    @property
    def budget(self) -> int | None:
        """The limit in bytes.

        Raises:
            ConfigurationError: It is no size.
        """
        if self.moment_memory is None:
            return None
        try:
            return int(convert_file_size_to_int(self.moment_memory))
        except ValueError as error:
            raise ConfigurationError(
                f'moment_memory={self.moment_memory!r} is no number of bytes, nor a size such as "8GB"'
            ) from error
