"""The files that stand beside the weights of a model: which of them belong to it, and which are of the training."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from safedelta_hf.report.provenance import RECORD_FILE

WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.h5.index.json",
    "*.msgpack",
    "*.msgpack.index.json",
    "*.onnx",
    "*.onnx_data",
    "*.ot",
    "*.npz",
    "*.distcp",
    "*.pkl",
    "*.part",
)
"""Weights as they were tuned, in any format or half written, and states of optimizer, scheduler and random numbers."""

TRAINER_FILES = ("trainer_state.json", "latest", "zero_to_fp32.py", RECORD_FILE)
"""What Trainer and DeepSpeed need to go on with a training; and what is said of other weights."""

TRAINER_FOLDERS = ("checkpoint-*", "global_step*", "pytorch_model_fsdp_*", "optimizer_*", "runs", ".*", "__pycache__")
"""Checkpoints, sharded states, logs, and what tools keep for themselves."""


def other_files(folder: Path, weights: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sort what stands beside the weights of a model.

    Args:
        folder: The folder.
        weights: Names of the files that hold the weights, and of their index.

    Returns:
        Files that belong to the model: configuration, tokenizer, code, cards; and files and folders that do not. Paths
        are relative to the folder.
    """
    copied: list[str] = []
    left_out: list[str] = []
    for path, is_kept in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if name not in weights:
            (copied if is_kept else left_out).append(name)
    return tuple(sorted(copied)), tuple(sorted(left_out))


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    for place, folders, files in os.walk(folder):
        for name in list(folders):
            path = Path(place, name)
            if _matches(name, TRAINER_FOLDERS) or path.is_symlink():
                folders.remove(name)
                yield path, False
        for name in files:
            path = Path(place, name)
            yield path, path.is_file() and not _matches(name, WEIGHT_FILES + TRAINER_FILES)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)
