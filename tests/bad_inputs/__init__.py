"""Bad inputs: whatever is given, a call ends right or in an error of this package's own, soon, and in little memory."""

import faulthandler
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safedelta_hf.errors import SafeDeltaError

T = TypeVar("T")

SECONDS = 5.0
"""CPU time that a call may take; not time on the clock, which depends on what else the machine does."""

CLOCKS = 12
"""Times as long may pass on the clock, for a call that waits and computes nothing."""

MEGABYTES = 256
"""Memory that a call may take beyond what the process holds."""


class Overdue(BaseException):
    """A call did not end in time; nothing that catches `Exception` swallows it."""


def right_or_named(
    call: Callable[[], T], *, seconds: float = SECONDS, megabytes: int = MEGABYTES
) -> T | SafeDeltaError:
    """Make a call that has to end right or in a `SafeDeltaError`, within bounds of time and memory.

    Args:
        call: What to do; in the main thread.
        seconds: CPU time that it may take.
        megabytes: Memory that it may take; more than that is not to be had, and is no excuse for an error.

    Returns:
        What it gave, or the error by which it was refused. Any other error goes through.

    Raises:
        AssertionError: It took too long or too much memory, or its error says nothing.
    """
    try:
        with _limited_time(seconds), _limited_memory(megabytes):
            return call()
    except Overdue as late:
        raise AssertionError(f"took over {late}") from late
    except SafeDeltaError as error:
        assert str(error).strip(), f"{type(error).__name__} says nothing"
        if greedy := next(filter(_is_out_of_memory, _causes(error)), None):
            raise AssertionError(
                f"took over {megabytes} MiB, and called it {type(error).__name__}: {error}"
            ) from greedy
        return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    def stop(number: int, _: object) -> None:
        raise Overdue(f"{seconds:g} s of CPU" if number == signal.SIGPROF else f"{CLOCKS * seconds:g} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, CLOCKS * seconds)}
    before = {number: signal.signal(number, stop) for number in timers}
    # No handler runs while compiled code does not come back.
    faulthandler.dump_traceback_later(2 * CLOCKS * seconds, exit=True, file=sys.__stderr__)
    try:
        for timer, limit in timers.values():
            signal.setitimer(timer, limit)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _limited_memory(megabytes: int) -> Iterator[None]:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(fields["VmData"].split()[0]) * 1024 + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


VALUES: dict[str, object] = {
    "null": None,
    "true": True,
    "text": "x",
    "minus one": -1,
    "zero": 0,
    "a fraction": 3.5,
    "huge": 10**30,
    "a hundred million": 10**8,
    "infinite": float("inf"),
    "a list": [],
    "a mapping": {},
    "a deep list": [[[[[[]]]]]],
}
"""What a setting of a file may have become."""


def crossed(names: Iterable[T]) -> list[tuple[T, str]]:
    """Give each name every second value, and its neighbour the others.

    Args:
        names: What can have any value.

    Returns:
        Pairs of a name and the name of a value.
    """
    return [(name, value) for number, name in enumerate(names) for value in list(VALUES)[number % 2 :: 2]]


def nested(depth: int) -> str:
    """JSON that is nested deeper than Python goes.

    Args:
        depth: How deep.

    Returns:
        The text.
    """
    return '{"a": ' * depth + "1" + "}" * depth


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"5",
    "nested": nested(100_000).encode(),
    "not UTF-8": b'{"peft_type": "\xff\xfe"}',
    "half a surrogate pair": b'{"peft_type": "\\ud800"}',
    "zero bytes": bytes(1000),
    "endless digits": b'{"r": ' + b"9" * 100_000 + b"}",
}
"""What a JSON file may have become."""


def damages(size: int) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Ways to damage a file.

    Args:
        size: Its bytes.

    Yields:
        What is done, and a function that does it.
    """
    for length in (0, 1, 7, 8, 9, 64, *(size * tenth // 10 for tenth in range(1, 10)), size - 1):
        yield f"cut to {length} bytes", lambda content, length=length: content[:length]
    for place in (*range(16), *(size * part // 12 for part in range(12))):
        yield f"byte {place} flipped", lambda content, place=place: _flipped(content, place)
    yield "grown", lambda content: content + bytes(64)
    yield "other bytes", lambda content: bytes(range(256)) * (len(content) // 256)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder holds.

    Args:
        folder: The folder.

    Returns:
        Bytes of each file, but the size of one that is large; what is no file has none.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {
        str(path): path.read_bytes() if path.stat().st_size < 1 << 20 else str(path.stat().st_size).encode()
        for path in files
    }
