"""What tells one set of inputs from another: names, sizes and times of model files, digests of what is in memory."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from safedelta_hf.records import ProfileHeader, Use
from safedelta_hf.weights.fingerprint import fingerprint
from safedelta_hf.weights.tensor_files import TensorFiles

Identity = Any
"""Plain values, which JSON can hold."""


def files_identity(files: TensorFiles) -> Identity:
    """What tells a checkpoint from others.

    Args:
        files: Its files.

    Returns:
        Name, size and time of last change of each.
    """
    index = () if files.index is None else (files.index,)
    return _times([*files.paths.values(), *index])


def folder_identity(folder: object) -> Identity:
    """What tells the files of a folder from others.

    Args:
        folder: The folder; anything else has none.

    Returns:
        Name, size and time of last change of each file; None for what is no folder.
    """
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        return None
    return _times(path for path in sorted(Path(folder).rglob("*")) if path.is_file())


def source_identity(source: object) -> Identity:
    """What tells a further model from others.

    Args:
        source: A model, its folder, or a reader of its weights.

    Returns:
        A digest of its weights if it is in memory, else what is known of its files.
    """
    if isinstance(source, nn.Module):
        return _digest(fingerprint(source))
    return folder_identity(source)


def profile_identity(header: ProfileHeader, uses: Sequence[Use], moments: str) -> Identity:
    """What tells a profile from others, wherever it is.

    Args:
        header: Its header.
        uses: How each covered parameter is used.
        moments: What tells its moments from others.

    Returns:
        A digest.
    """
    return _digest([asdict(header), [asdict(use) for use in uses], moments])


def _digest(values: Identity) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _times(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    found = []
    for path in paths:
        status = path.stat()
        found.append((path.name, status.st_size, status.st_mtime_ns))
    return found
