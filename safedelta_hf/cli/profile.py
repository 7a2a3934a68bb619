"""`safedelta profile`: collect a profile of a base model, from files to files or to the Hub."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.cli.options import (
    ORDINARY_WEIGHT,
    ORDINARY_WEIGHT_HELP,
    STORAGE_NAMES,
    one_line_errors,
    quieten_libraries,
    require_one_of,
)
from safedelta_hf.cli.reading import (
    BatchSize,
    Holdout,
    MaxLength,
    MomentMemory,
    OffloadFolder,
    ShareMoments,
    Targets,
    reading,
    reading_config,
)
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.folders import require_absent, require_writable
from safedelta_hf.report.printing import printed, written

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from safedelta_hf.data.templates import ProcessingClass
    from safedelta_hf.profile.encodings import Encoding
    from safedelta_hf.profile.profile import SafetyProfile

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
STORAGES: Final = ", ".join(STORAGE_NAMES)
DEFAULT_STORAGE: Final = "triangular"

_HUB: Final = "Hub"


def profile(
    model: Annotated[str, typer.Option(help="Name or folder of the base (aligned) model, or of an adapter on it.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist. A killed run goes on there.")],
    safety_data: Annotated[Path | None, typer.Option(help="Harmful prompts with a safe model's responses.")] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Examples of the fine-tuning data instead, for rules that weigh the task.")
    ] = None,
    sorted_by: Annotated[
        Path | None,
        typer.Option(help="Safety data, or a profile of it: what the base refuses as there leaves the task."),
    ] = None,
    ordinary_data: Annotated[
        Path | None, typer.Option(help="Ordinary prompts with the base's responses, to protect as well.")
    ] = None,
    ordinary_weight: Annotated[float | None, typer.Option(help=ORDINARY_WEIGHT_HELP)] = None,
    storage: Annotated[str, typer.Option(help=f"How moments are stored: {STORAGES}.")] = DEFAULT_STORAGE,
    batch_size: BatchSize = ProfileConfig.batch_size,
    max_length: MaxLength = None,
    dtype: Annotated[
        str, reading(f"Data type of the weights: {', '.join(DTYPES)}; that of the fine-tuning, if they are to match.")
    ] = "auto",
    device: Annotated[str, reading("Device, or device map of transformers: cpu, cuda:0, auto, ...")] = "auto",
    holdout: Holdout = None,
    targets: Targets = None,
    share_moments: ShareMoments = True,
    moment_memory: MomentMemory = None,
    offload_folder: OffloadFolder = None,
    save_every: Annotated[
        int | None, reading("Keep the sums after every so many batches; a killed run goes on there.", min=1)
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository on the Hub to upload to as well.", rich_help_panel=_HUB)
    ] = None,
    private: Annotated[
        bool, typer.Option(help="Make that repository private, if it is new.", rich_help_panel=_HUB)
    ] = False,
) -> None:
    """Collect the profile of a base model once, for every fine-tune of it."""
    with one_line_errors():
        # Everything that is small is checked before anything that is large is loaded.
        source, purpose = _source(safety_data, task_data, sorted_by, ordinary_data, holdout)
        _require_effect(ordinary_data, ordinary_weight, push_to_hub, private=private)
        _require_name(push_to_hub)
        require_one_of(DTYPES, dtype, "--dtype")
        config = reading_config(
            batch_size=batch_size,
            max_length=max_length,
            holdout=0.0 if task_data is not None else holdout,
            targets=targets,
            share_moments=share_moments,
            moment_memory=moment_memory,
            offload_folder=offload_folder,
        )
        require_absent(output)
        require_writable(output)
        from safedelta_hf.capture.collect import Checkpointing, collect_profile  # takes seconds
        from safedelta_hf.profile.encodings import encoding_of
        from safedelta_hf.profile.profile import with_ordinary

        quieten_libraries(bars=False)
        encoding = encoding_of(storage)
        data = {purpose: source, "ordinary data": ordinary_data, SAFETY_DATA: sorted_by or safety_data}
        base, loaded, tokenizer = _loaded(model, data, max_length, dtype=dtype, device=device)
        sums = output.with_name(f".{output.name}.sums")
        checkpointing = None if save_every is None else Checkpointing(sums, every=save_every)
        how: dict[str, Any] = {"config": config, "checkpointing": checkpointing}
        found = collect_profile(loaded, source, tokenizer, purpose=purpose, sorted_by=sorted_by, **how)
        if ordinary_data is not None:
            weight = ORDINARY_WEIGHT if ordinary_weight is None else ordinary_weight
            how |= {"config": replace(config, holdout=0.0), "digests": found.header.base}
            ordinary = collect_profile(loaded, ordinary_data, tokenizer, purpose="ordinary data", **how)
            found = with_ordinary(found, ordinary, weight)
        found.save(output, encoding)
        typer.echo(_summary(found, output))
        if task_data is not None and sorted_by is None:
            typer.echo("The task is not sorted by what the base would refuse; that needs --sorted-by")
        try:
            if push_to_hub is not None:
                on_hub = None if Path(base).exists() else base
                address = _pushed(found, output, push_to_hub, storage=encoding, base_model=on_hub, private=private)
                typer.echo(f"Uploaded: {address}")
        finally:
            if checkpointing is not None:
                shutil.rmtree(sums)  # what is uploaded is read from there


def _loaded(
    model: str, data: Mapping[str, Path | None], max_length: int | None, *, dtype: str, device: str
) -> "tuple[str, PreTrainedModel, ProcessingClass]":
    from safedelta_hf.data.dataset import read_safety_data  # takes seconds
    from safedelta_hf.modules.loading import load_base, load_tokenizer, source_of

    read, what = source_of(model, "--model"), f"--model {model!r}"
    if read.adapter is not None:
        typer.echo(f"{model} is an adapter; the profile is that of its base, {read.base}")
    tokenizer = load_tokenizer(read, what)
    for purpose, source in data.items():
        if source is not None and not source.is_dir():
            read_safety_data(source, tokenizer, max_length, purpose=purpose)
    return read.base, load_base(read, f"{what} (on --device {device!r})", dtype=dtype, device_map=device), tokenizer


def _require_effect(
    ordinary_data: Path | None, ordinary_weight: float | None, push_to_hub: str | None, *, private: bool
) -> None:
    if ordinary_data is None and ordinary_weight is not None:
        raise ConfigurationError("--ordinary-weight has no effect without --ordinary-data")
    if ordinary_weight is not None and not 0 < ordinary_weight < math.inf:
        raise ConfigurationError(f"--ordinary-weight {ordinary_weight:g} must be a positive number")
    if private and push_to_hub is None:
        raise ConfigurationError("--private has no effect without --push-to-hub")


def _source(
    safety_data: Path | None,
    task_data: Path | None,
    sorted_by: Path | None,
    ordinary_data: Path | None,
    holdout: float | None,
) -> tuple[Path, str]:
    if safety_data is not None and task_data is None:
        if sorted_by is not None:
            raise ConfigurationError("--sorted-by has no effect without --task-data")
        return safety_data, SAFETY_DATA
    if task_data is None or safety_data is not None:
        raise ConfigurationError("give one of --safety-data and --task-data; each makes a profile of its own")
    if ordinary_data is not None or holdout is not None:
        raise ConfigurationError("--ordinary-data and --holdout go with --safety-data, and have no effect on a task")
    return task_data, "task data"


def _require_name(repository: str | None) -> None:
    if repository is None:
        return
    from huggingface_hub.errors import HFValidationError  # takes a second
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigurationError(f"--push-to-hub {repository!r} is no name of a repository ({error})") from error


def _pushed(
    found: "SafetyProfile", output: Path, name: str, *, storage: "Encoding", base_model: str | None, private: bool
) -> str:
    how: dict[str, Any] = {"storage": str(storage), "base_model": base_model, **({"private": True} if private else {})}
    try:
        return found.push_to_hub(name, **how)
    except (OSError, ProfileError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in how.items())
        raise ProfileError(
            f"{error}. The profile is saved in {str(output)!r} all the same; upload it with "
            f"SafetyProfile.load({str(output)!r}).push_to_hub({name!r}, {given})"
        ) from error


def _summary(found: "SafetyProfile", output: Path) -> str:
    header, held_out = found.header, found.held_out
    aside = "none" if held_out is None else str(len(held_out.sequences))
    size = sum(path.stat().st_size for path in output.iterdir())
    lines = [
        f"{header.architecture}: {len(found.moments)} moments of {header.sequences} sequences "
        f"({header.tokens} tokens), {aside} held out to measure by",
        *(f"  not covered: {name}: {reason}" for name, reason in header.skipped.items()),
        *([header.sorting.summary, header.sorting.told] if header.sorting is not None else []),
    ]
    return printed(*lines) + written(output, note=f" ({size / 2**20:.1f} MiB)")
