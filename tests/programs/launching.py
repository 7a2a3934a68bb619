"""Programs on two processes, started as a user would."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(module: str, *arguments: object, processes: int = 2, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run a module of the tests under torchrun; the caller looks at what comes back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return run([*launcher, "--master_port", str(port), "-m", module, *map(str, arguments)], timeout)


def accelerate_launch(module: str, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a module of the tests under `accelerate launch`."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    defaults = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return run([*launcher, *defaults, "--main_process_port", "0", "-m", module, *map(str, arguments)])


def run(command: list[str], timeout: float = 400) -> subprocess.CompletedProcess:
    """Run a command at the root of the repository, with one thread for each process."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def passes(module: str, *arguments: object, processes: int = 2) -> str:
    """Run a module, require that all ranks end well, and return what they printed."""
    done = torchrun(module, *arguments, processes=processes)
    cause = f"{ABORTED}\n" if aborted(done.stderr) else ""
    assert done.returncode == 0, f"{cause}{done.stdout[-4000:]}\n{done.stderr}"
    return done.stdout


ABORTED = "A rank was aborted without an error of Python or a C++ exception."
"""Such a test is run once more (tests/conftest.py)."""


def aborted(stderr: str) -> bool:
    """Whether the rank that failed first was aborted as threads of gloo do now and then (pytorch issue 190489).

    What a program asserts or raises ends in a traceback, and collectives that do not fit in a C++ exception.
    """
    cause = re.search(r"Root Cause.*?rank\s+: (\d+).*?exitcode\s+: (-?\d+)", stderr, flags=re.DOTALL)
    return (
        bool(cause)
        and int(cause[2]) == -signal.SIGABRT
        and "terminate called without an active exception" in stderr
        and f"[rank{cause[1]}]:" not in stderr
        and "what():" not in stderr
    )
