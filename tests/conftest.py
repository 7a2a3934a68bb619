"""Tiny models and data, and quiet defaults."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

from tests import tiny

torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def llama():
    return tiny.llama()


@pytest.fixture
def folder(tmp_path):
    """A saved llama with a tied head."""
    tiny.llama(tied=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def gpt2():
    return tiny.gpt2()


@pytest.fixture
def safety_rows():
    return tiny.rows(24, seed=1)


@pytest.fixture
def train_rows():
    return tiny.rows(16, seed=2, length=10)
