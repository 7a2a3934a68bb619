"""Programs on two processes: started as a user would, or forked from a process that has imported everything."""

import functools
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


@functools.cache
def python() -> ForkServerContext:
    """Processes that have imported all that takes seconds, and have run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.programs.training", "tests.programs.resuming"])
    return context


class Ended(NamedTuple):
    """How forked processes ended.

    Attributes:
        returncode: Of the rank that failed first; 0 if none did.
        stdout: What they printed, rank by rank.
        stderr: The same of errors.
        cause: What the rank that failed first printed there.
    """

    returncode: int
    stdout: str
    stderr: str
    cause: str


def forked(module: str, *arguments: object, processes: int = 2, timeout: float = 400) -> Ended:
    """Run a module of the tests with what torchrun tells its processes; what they print comes back rank by rank.

    How a run ends whose processes do not end well is torchrun's to decide: `torchrun` is for tests of that.
    """
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(processes):
            own = {**told, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            values = (module, tuple(map(str, arguments)), own, Path(folder) / str(rank))
            ranks.append(python().Process(target=_run_rank, args=values))
            ranks[-1].start()
        failed = _first_failed(ranks, timeout)
        shown, errors = (
            [_read(Path(folder) / f"{rank}.{stream}") for rank in range(processes)] for stream in ("out", "err")
        )
    code, cause = (0, "") if failed is None else (ranks[failed].exitcode, errors[failed])
    return Ended(code, "".join(shown), "".join(errors), cause)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""  # ended before it began


def command(*arguments: object) -> BaseProcess:
    """Start `safedelta` with some arguments, in a process of its own that says nothing."""
    process = python().Process(target=_run_command, args=(list(map(str, arguments)),))
    process.start()
    return process


def _run_command(arguments: list[str]) -> None:
    with open(os.devnull, "wb") as nothing:
        for descriptor in (1, 2):
            os.dup2(nothing.fileno(), descriptor)
    importlib.import_module("safedelta_hf.cli.main").app(arguments)


def _run_rank(module: str, arguments: tuple[str, ...], told: dict[str, str], place: Path) -> None:
    os.environ.update(told)
    for descriptor, stream in ((1, "out"), (2, "err")):
        with place.with_suffix(f".{stream}").open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    gc.freeze()  # what was imported need not be looked through for garbage
    importlib.import_module(module).main(*arguments)


def _first_failed(ranks: list[BaseProcess], timeout: float) -> int | None:
    """Wait for all, or for the first that fails, and end the others; returns which one that was."""
    end = time.monotonic() + timeout
    try:
        left = {rank.sentinel: rank for rank in ranks}
        while left:
            ready = multiprocessing.connection.wait(left, max(0.0, end - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired("a program of the tests", timeout)
            for sentinel in ready:
                rank = left.pop(sentinel)
                rank.join()
                if rank.exitcode:
                    return ranks.index(rank)
        return None
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(module: str, *arguments: object, processes: int = 2, timeout: float = 400) -> subprocess.CompletedProcess:
    """Run a module of the tests under torchrun; the caller looks at what comes back."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return run([*launcher, "--master_port", str(free_port()), "-m", module, *map(str, arguments)], timeout)


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
    """Run a module in forked processes, require that all ranks end well, and return what they printed."""
    done = forked(module, *arguments, processes=processes)
    cause = f"{ABORTED}\n" if aborted(done.returncode, done.cause) else ""
    assert done.returncode == 0, f"{cause}{done.stdout[-4000:]}\n{done.stderr}"
    return done.stdout


ABORTED = "A rank was aborted without an error of Python or a C++ exception."
"""Such a test is run once more (tests/conftest.py)."""


def aborted(code: int, said: str) -> bool:
    """Whether the rank that failed first was aborted as threads of gloo do now and then (pytorch issue 190489).

    What a program asserts or raises ends in a traceback, and collectives that do not fit in a C++ exception.
    """
    return (
        code == -signal.SIGABRT
        and "terminate called without an active exception" in said
        and "Traceback" not in said
        and "what():" not in said
    )
