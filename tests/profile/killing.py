"""Saves a profile in processes that are killed at a given point; run by a test, in an interpreter of its own.

    python -m tests.profile.killing SOURCE FOLDER STORAGE SHARD_BYTES BYTES...

One interpreter loads everything once and forks for each point, so a hundred kills take seconds.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from safedelta_hf import SafetyProfile
from safedelta_hf.profile import files


def event_killer(folder: Path, point: int):
    """Kill this process before the n-th thing that it does to the file system there."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.chmod", "os.rmdir") and arguments:
            if str(folder) in str(arguments[0]):
                seen += 1
                if seen == point:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def byte_killer(point: int):
    """Kill this process when a file grows beyond so many bytes, in the middle of a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (point, point))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def attempt(profile, folder: Path, storage: str, kill) -> bool:
    """Save in a child that is killed; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            kill()
            profile.save(folder, storage)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(3)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, f"the child failed, status {status}"
    return os.WIFSIGNALED(status)


def main():
    torch.set_num_threads(1)
    source, parent, storage = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    files.SHARD_BYTES = int(sys.argv[4])
    profile = SafetyProfile.load(source)
    points = {}
    for point in range(1, 1000):
        folder = parent / f"event-{point}" / "profile"
        folder.parent.mkdir()
        if not attempt(profile, folder, storage, lambda folder=folder, point=point: event_killer(folder.parent, point)):
            break
        points[folder.parent.name] = True
    for point in map(int, sys.argv[5:]):
        folder = parent / f"byte-{point}" / "profile"
        folder.parent.mkdir()
        assert attempt(profile, folder, storage, lambda point=point: byte_killer(point)), "nothing was so large"
        points[folder.parent.name] = True
    print(json.dumps(list(points)))


if __name__ == "__main__":
    main()
