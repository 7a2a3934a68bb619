"""Points of a comparison on disk, written as they are measured, so that a run that was killed goes on."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.result import Score
from safedelta_hf.folders import RunLog
from safedelta_hf.rules import Rule

RESULTS = "results.jsonl"

_FORMERLY: Final = {"retention": "ordinary_weight"}
"""Names of settings in files of earlier versions."""

Key = tuple[str, str, int | None, str, str]
"""Scenario, what was trained, seed, method, and its settings."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model that was made and measured.

    Attributes:
        scenario: What was fine-tuned on, or the fine-tuned model's folder.
        seed: Seed of the fine-tuning, where the comparison made it.
        weights: What was trained, "full" or "lora".
        method: "aligned", "fine-tuned", another baseline, or the name of a rule.
        settings: What the method was given.
        scores: What was measured, by name.
        seconds: Time that making the model took: fine-tuning, or adjusting with the search for a strength.
        search: How a strength was found by measuring, with every trial; None where there was no search.
    """

    scenario: str
    seed: int | None
    weights: str
    method: str
    settings: Mapping[str, Any]
    scores: Mapping[str, Score]
    seconds: float
    search: Mapping[str, Any] | None = None

    @property
    def key(self) -> Key:
        """What tells it from other points."""
        return key_of(self.scenario, self.weights, self.seed, self.method, self.settings)


def key_of(scenario: str, weights: str, seed: int | None, method: str, settings: Mapping[str, Any]) -> Key:
    """What tells a point from others.

    Args:
        scenario: As in `Point`.
        weights: As in `Point`.
        seed: As in `Point`.
        method: As in `Point`.
        settings: As in `Point`.

    Returns:
        A key.
    """
    return scenario, weights, seed, method, json.dumps(settings, sort_keys=True)


class ComparisonFile:
    """The points of a comparison, in a file to which each is appended as it is measured.

    Args:
        folder: Folder of the file, `results.jsonl`; it is made.
        made_with: Everything that all points depend on, such as fingerprints of models and prompts.
        utilities: What each score but attack success says: "gain" is what the fine-tuning is for, "kept" what the
            aligned model could do, "cost" what should stay low.
        command: The command line that goes on with the file.
        default: The rule that adjusts where nothing else is asked for; it is marked.

    Raises:
        ConfigurationError: The folder cannot be made.
        OutputError: The file there was made with something else, or is no such file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        made_with: Mapping[str, Any],
        utilities: Mapping[str, str],
        command: str,
        default: Rule | None = None,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"--output {str(folder)!r} is no folder and cannot be made one ({error})"
            ) from error
        self.utilities, self.default = dict(utilities), default
        self._log = RunLog(folder / RESULTS, {**made_with, "utilities": utilities}, _parsed)
        self._points = {entry.key: entry for entry in self._log.entries if isinstance(entry, Point)}
        self.commands = [entry for entry in self._log.entries if isinstance(entry, str)]
        if command not in self.commands:
            self.commands.append(command)
            self._log.append({"command": command})
        self.left_out: dict[str, str] = {}

    @property
    def points(self) -> tuple[Point, ...]:
        """All points, in the order in which they were measured."""
        return tuple(self._points.values())

    def __contains__(self, key: Key) -> bool:
        return key in self._points

    def add(self, point: Point) -> None:
        """Keep a point, on disk too.

        Args:
            point: The point.
        """
        self._log.append({"point": asdict(point)})
        self._points[point.key] = point


def _parsed(line: Mapping[str, Any]) -> Point | str:
    if "command" in line:
        return str(line["command"])
    row = line["point"]
    scores = {name: Score(**score) for name, score in row["scores"].items()}
    settings = {_FORMERLY.get(name, name): value for name, value in row["settings"].items()}
    return Point(**{**row, "scores": scores, "settings": settings})
