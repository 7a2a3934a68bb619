"""Tiny models and data, and quiet defaults."""

import gc
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start; pytest has one for each core already
os.environ.pop("COLUMNS", None)  # no terminal, where pytest-xdist tells its workers of one

import pytest
import torch
from hypothesis import settings

from tests.fixtures import tiny
from tests.programs import launching

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, max_examples=10, derandomize=True)
settings.register_profile("ci", parent=settings.get_profile("quick"), max_examples=40)
settings.load_profile("ci" if os.environ.get("CI") else "quick")


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


def pytest_collection_modifyitems(items):
    for item in items:
        if "distributed" in item.path.parts:
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=[re.escape(launching.ABORTED)]))


def pytest_collection_finish():
    """Let no collection of garbage look through what lives as long as the run: modules, and thousands of tests."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """How many architectures the sweep covered, wherever it ran."""
    stats = terminalreporter.stats
    sweep = {
        outcome: sum("test_an_architecture_is_covered" in report.nodeid for report in stats.get(outcome, ()))
        for outcome in ("passed", "failed", "skipped")
    }
    if total := sum(sweep.values()):
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sweep.items() if count)
        terminalreporter.write_line(f"architectures covered: {sweep['passed']} of {total} ({counts})")
