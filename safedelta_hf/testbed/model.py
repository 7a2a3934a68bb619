"""The aligned model that ships with the package."""

from pathlib import Path
from typing import Final

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ALIGNED_MODEL: Final = Path(__file__).with_name("aligned")
"""Folder of the aligned model and its tokenizer, as ordinary Hugging Face files."""


def load_aligned() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the aligned model and its tokenizer.

    Returns:
        A new model in evaluation mode, in float32 on the CPU, and its tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(ALIGNED_MODEL)
    return model, AutoTokenizer.from_pretrained(ALIGNED_MODEL)
