"""How a command reads data with a base: its options, written once for all commands that do."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from safedelta_hf.capture.config import ALL_LINEAR, ProfileConfig

_PANEL: Final = "How data is read"


def reading(text: str, **settings: Any) -> Any:  # noqa: ANN401 - what Annotated takes
    """An option of how data is read.

    Args:
        text: Its help.
        **settings: Further arguments of typer.

    Returns:
        The option.
    """
    return typer.Option(help=text, rich_help_panel=_PANEL, **settings)


BatchSize = Annotated[int, reading("Sequences of one length per forward pass, at most.", min=1)]
MaxLength = Annotated[int | None, reading("Cut sequences to this many tokens.", min=1)]
Holdout = Annotated[
    float | None, reading("Share of the safety data to measure refusals by; default 0.25 of at least 16 rows.")
]
Targets = Annotated[
    list[str] | None,
    reading("Linear weights to read, and to adjust, as PEFT's target modules; repeatable; default all."),
]
ShareMoments = Annotated[bool, reading("One moment for layers that read the same tensor.")]
MomentMemory = Annotated[str | None, reading('Memory for moments on the device, such as "8GB"; default what is free.')]
OffloadFolder = Annotated[Path | None, reading("Folder for the moments beyond --moment-memory.")]


def reading_config(
    *,
    batch_size: int,
    max_length: int | None,
    holdout: float | None,
    targets: list[str] | None,
    share_moments: bool,
    moment_memory: str | None,
    offload_folder: Path | None,
) -> ProfileConfig:
    """What the options say.

    Args:
        batch_size: As the option.
        max_length: As the option.
        holdout: As the option.
        targets: As the option.
        share_moments: As the option.
        moment_memory: As the option.
        offload_folder: As the option.

    Returns:
        How data is read.

    Raises:
        ConfigurationError: A value is outside its range.
    """
    memory: int | str | None = moment_memory
    if moment_memory is not None and moment_memory.isdecimal():
        memory = int(moment_memory)
    return ProfileConfig(
        batch_size=batch_size,
        max_length=max_length,
        moment_memory=memory,
        offload_folder=offload_folder,
        share_moments=share_moments,
        holdout=holdout,
        targets=targets or ALL_LINEAR,
    )
