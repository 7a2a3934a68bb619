"""The scripts that users copy, run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(name, tmp_path):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "adjusted" in result.stdout and "model.embed_tokens.weight" in result.stdout


def test_the_benchmark_runs():
    small = ["--hidden=32", "--layers=1", "--steps=2", "--safety=4", "--repeats=1"]
    script = EXAMPLES / "benchmarks" / "cost.py"
    result = subprocess.run([sys.executable, str(script), *small], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "capture:" in result.stdout and "peak memory:" in result.stdout
