"""Responses on disk, written as they are made, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safedelta_hf.errors import DataError

Line = Mapping[str, Any]


class ResponseFile:
    """A JSON-lines file of several parts, such as the responses to the harmful prompts.

    The first line of a part says what it is made with: fingerprints of model, prompts and settings. Each line after
    that is one result. Lines are appended in batches, each in one piece; what a killed run left of a last line is cut
    off.

    Args:
        path: The file; it is made when the first part begins.

    Raises:
        DataError: The file holds lines that this class did not write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._made_with: dict[str, dict[str, str]] = {}
        self._known: dict[str, dict[int, Line]] = {}
        if path.exists():
            self._read()

    def begin(self, part: str, made_with: Mapping[str, str]) -> dict[int, Line]:
        """Begin a part, or go on with it.

        Args:
            part: Its name.
            made_with: Fingerprint of everything that its results depend on, by name.

        Returns:
            The results that are there already, by index.

        Raises:
            DataError: The part was begun with something else.
        """
        there = self._made_with.get(part)
        if there is None:
            self._made_with[part] = dict(made_with)
            self._known[part] = {}
            self._write({"part": part, "made_with": dict(made_with)})
            return {}
        changed = sorted(name for name in {*there, *made_with} if there.get(name) != made_with.get(name))
        if changed:
            raise DataError(
                f"{self._path}: the {part} results there were made with other {' and '.join(changed)}; "
                "choose another output folder, or delete this file"
            )
        return dict(self._known[part])

    def append(self, part: str, results: Mapping[int, Line]) -> None:
        """Add results to a part that has begun.

        Args:
            part: Its name.
            results: Results by index.
        """
        self._known[part].update(results)
        self._write(*({"part": part, "index": index, **results[index]} for index in sorted(results)))

    def _write(self, *lines: Line) -> None:
        # One call, so that a batch is there or not; to disk at once, as the next batch may be the last.
        with self._path.open("ab", buffering=0) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            os.fsync(file.fileno())

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self._path} line {number} is no line of a response file ({type(error).__name__}: {error}); "
                    "choose another output folder, or delete this file"
                ) from error
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))

    def _take(self, line: dict[str, Any]) -> None:
        part = line.pop("part")
        if "made_with" in line:
            self._made_with[part] = dict(line["made_with"])
            self._known[part] = {}
        else:
            self._known[part][int(line.pop("index"))] = line
