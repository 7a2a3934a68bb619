"""Folders that are complete or not there at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Write a folder under a temporary name beside it, and rename it once the block has succeeded.

    Args:
        folder: A folder that does not exist, or is empty; its parents are made.

    Yields:
        The folder to write into; it is removed if the block fails.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        # Temporary folders, and safetensors files, are made for their owner alone.
        unfinished.chmod(0o755)
        for path in unfinished.iterdir():
            if path.is_file():
                path.chmod(0o644)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
