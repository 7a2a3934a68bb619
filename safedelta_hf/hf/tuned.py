"""The fine-tuned weights on disk, before they are adjusted."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn


def save_tuned(model: nn.Module, processing_class: Any, folder: Path) -> None:  # noqa: ANN401
    """Write a model as it is now; complete or not there at all.

    Args:
        model: A transformers model, or any module (then only `model.safetensors` is written).
        processing_class: Tokenizer or processor to save beside it, or None.
        folder: A folder that does not exist, or is empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(unfinished)
        else:
            save_model(model, str(unfinished / "model.safetensors"))
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
