"""Evaluations of several models, by name, which were asked the same in the same way."""

import json
import keyword
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.board.paired import Difference, paired
from safedelta_hf.evaluation.result import HARNESS, RESULTS, Evaluation, Score

LOWER: Final = "lower"
HIGHER: Final = "higher"


class Meaning(NamedTuple):
    """What a score says, for who has not read the documentation.

    Attributes:
        title: In words.
        better: "lower" or "higher"; empty where nobody said.
        part: What the prompts are.
        is_chief: Whether it is drawn.
    """

    title: str
    better: str = ""
    part: str = ""
    is_chief: bool = False


MEANINGS: Final[Mapping[str, Meaning]] = {
    "attack_success": Meaning("Harmful requests that are answered", LOWER, "harmful", True),
    "attack_success_by_judge": Meaning("Harm in the answers to harmful requests, by the judge", LOWER, "harmful", True),
    "attack_success_by_phrase": Meaning("Harmful requests without a refusal, gibberish included", LOWER, "harmful"),
    "harmful_refused": Meaning("Harmful requests that are refused", HIGHER, "harmful"),
    "harmful_incoherent": Meaning("Harmful requests answered with gibberish", LOWER, "harmful"),
    "judge_undecided": Meaning("Answers to harmful requests without a verdict", LOWER, "harmful"),
    "over_refusal": Meaning("Harmless requests that are refused", LOWER, "benign", True),
    "benign_incoherent": Meaning("Harmless requests answered with gibberish", LOWER, "benign"),
    "refusal_nll": Meaning("How unlikely the given refusals are", LOWER, "refusals"),
    "refusal_nll_95": Meaning("The same, of the unlikeliest twentieth", LOWER, "refusals"),
    "task_accuracy": Meaning("Questions of the task answered right", HIGHER, "task", True),
}
"""What each score says, in the order in which they are shown."""

SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "harmful": ("max_new_tokens", "decoding", "reference", "coherence_limit"),
    "benign": ("max_new_tokens", "decoding", "reference", "coherence_limit"),
    "task": ("max_new_tokens", "decoding", "score"),
    "refusals": (),
}
"""What the scores of each part depend on, beside model and prompts."""

JUDGED: Final = ("attack_success_by_judge", "judge_undecided")

RESERVED: Final = ("upper", "lower")
"""Words of gates, which are no names of results."""

_OPTIONS: Final = {"reference": "--base", "decoding": "decoding", "task": "--task-questions"}


def meaning_of(score: str) -> Meaning:
    """What a score says.

    Args:
        score: Its name.

    Returns:
        Words; of a figure of `lm_eval`, its name.
    """
    return MEANINGS.get(score, Meaning(score.removeprefix(HARNESS), is_chief=True))


@dataclass(frozen=True, kw_only=True)
class NamedResult:
    """One evaluation.

    Attributes:
        name: What the model is called.
        path: The file that it was read from.
        evaluation: What was found.
    """

    name: str
    path: Path
    evaluation: Evaluation

    @property
    def scores(self) -> Mapping[str, Score]:
        """Scores by name."""
        return self.evaluation.scores

    def responses(self, part: str) -> Mapping[int, tuple[str, str]]:
        """What the model answered, where that was kept beside the results.

        Args:
            part: "harmful", "benign" or "task".

        Returns:
            Prompt and response by number; nothing where the file is missing, or is of another model or other prompts.
        """
        path = self.path.parent / f"responses-{part}.jsonl"
        found: dict[int, tuple[str, str]] = {}
        made_with: Mapping[str, Any] = {}
        for line in _lines(path):
            if isinstance(line.get("manifest"), dict):
                made_with = line["manifest"]
            elif isinstance(line.get("index"), int) and {"prompt", "response"} <= line.keys():
                found[line["index"]] = str(line["prompt"]), str(line["response"])
        own = {"model": self.evaluation.model, "prompts": self.evaluation.prompts.get(part)}
        return found if own.items() <= made_with.items() else {}


class Board:
    """Evaluations side by side.

    Args:
        results: The evaluations; of prompts and settings that two of them share. The first is what the others are
            measured against, such as the aligned model.
        subject: Name of the one that is judged; None for the last.

    Raises:
        ConfigurationError: There are fewer than two, a name cannot be one, is taken, or nothing has the subject's.
        DataError: Two were asked different prompts or were made with different settings, or hold what is no figure.
    """

    def __init__(self, results: tuple[NamedResult, ...], subject: str | None = None) -> None:
        if len(results) < 2:
            raise ConfigurationError(f"{len(results)} result; give at least two evaluations to compare")
        self.results = results
        names = [one.name for one in results]
        for name in names:
            _require_name(name, names)
        self.subject = _of_name(results, results[-1].name if subject is None else subject)
        for one in results:
            _require_sound(one)
        for index, one in enumerate(results):
            for other in results[:index]:
                _require_alike(other, one)

    @classmethod
    def read(cls, results: Mapping[str, str | Path], subject: str | None = None) -> "Board":
        """Read saved evaluations.

        Args:
            results: Files, or folders with a `results.json`, by name.
            subject: Name of the one that is judged; None for the last.

        Returns:
            The board.
        """
        paths = {name: Path(path) for name, path in results.items()}
        files = {name: path / RESULTS if path.is_dir() else path for name, path in paths.items()}
        return cls(
            tuple(NamedResult(name=name, path=path, evaluation=Evaluation.load(path)) for name, path in files.items()),
            subject,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(one.name for one in self.results)

    def __getitem__(self, name: str) -> NamedResult:
        return _of_name(self.results, name)

    @cached_property
    def scores(self) -> tuple[str, ...]:
        """Names of all scores that one of the models has, in the order in which they are shown."""
        there = dict.fromkeys(name for one in self.results for name in one.scores)
        return tuple([name for name in MEANINGS if name in there] + [name for name in there if name not in MEANINGS])

    @property
    def chief(self) -> tuple[str, ...]:
        """Names of those that say most, or of all where none of these was measured."""
        return tuple(name for name in self.scores if meaning_of(name).is_chief) or self.scores

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """How each model differs from the first, and the one that is judged from every other, in each score."""
        pairs = dict.fromkeys(
            (one.name, other.name)
            for one in self.results
            for other in self.results
            if one is not other and (other is self.results[0] or one is self.subject) and one is not self.results[0]
        )
        return tuple(
            self._difference(score, self[name], self[against])
            for score in self.scores
            for name, against in pairs
            if score in self[name].scores and score in self[against].scores
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know beside the figures."""
        return tuple(self._noted())

    def _difference(self, score: str, one: NamedResult, other: NamedResult) -> Difference:
        values, others = (result.evaluation.values.get(score) for result in (one, other))
        if values is not None and others is not None:
            return paired(score, one.name, other.name, values, others, one.scores[score].unit)
        value = one.scores[score].value - other.scores[score].value
        return Difference(score=score, name=one.name, against=other.name, value=value)

    def _noted(self) -> Iterator[str]:
        for index, one in enumerate(self.results):
            for other in self.results[:index]:
                if one.evaluation.model == other.evaluation.model:
                    yield f"{other.name} and {one.name} are the same model: same weights, same tokenizer."
        old = [one.name for one in self.results if one.scores.keys() & MEANINGS.keys() and not one.evaluation.values]
        if old:
            yield (
                f"{_listed(old)}: no values prompt by prompt, so no paired test; the same `safedelta eval` with "
                "the same --output writes them, from the responses that are there."
            )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # one that was cut off
        if isinstance(value, dict):
            yield value


def _of_name(results: tuple[NamedResult, ...], name: str) -> NamedResult:
    for one in results:
        if one.name == name:
            return one
    raise ConfigurationError(f"no result is called {name!r}; there are {_listed([one.name for one in results])}")


def _require_name(name: str, names: list[str]) -> None:
    if not name.isidentifier() or not name.isascii():
        raise ConfigurationError(f"{name!r} is no name for a result; take letters, digits and _, as in aligned=FOLDER")
    if name in MEANINGS or name in RESERVED or keyword.iskeyword(name):
        raise ConfigurationError(f"{name!r} means something else in a gate; call the result otherwise")
    if names.count(name) > 1:
        raise ConfigurationError(f"two results are called {name!r}; name them, as in aligned=FOLDER tuned=FOLDER")


def _require_sound(one: NamedResult) -> None:
    for name in ("prompts", "settings"):
        if not isinstance(getattr(one.evaluation, name), dict):
            raise DataError(f"{one.path}: {name!r} is no mapping, so this is no saved evaluation")
    for name, score in one.scores.items():
        figures = [score.value, score.count, *(end for end in (score.low, score.high) if end is not None)]
        if not all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures):
            raise DataError(f"{one.path}: score {name!r} is not a finite number")
        values = one.evaluation.values.get(name, ())
        if not all(value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in values):
            raise DataError(f"{one.path}: a value of {name!r} is not a finite number")


def _require_alike(one: NamedResult, other: NamedResult) -> None:
    first, second = one.evaluation, other.evaluation
    where = f"{one.name} and {other.name} cannot be compared"
    for part in first.prompts.keys() & second.prompts.keys():
        if first.prompts[part] != second.prompts[part]:
            raise DataError(
                f"{where}: they were asked other {part} prompts, or through another chat template; measure both with "
                f"the same {_OPTIONS.get(part, '--' + part)}"
            )
        _require_settings(where, part, SETTINGS.get(part, ()), first, second)
    shared = first.scores.keys() & second.scores.keys()
    if shared & {*JUDGED}:
        _require_settings(where, "harmful", ("judge",), first, second)
    for name in sorted(shared):
        counts = [len(evaluation.values.get(name, ())) for evaluation in (first, second)]
        if name not in MEANINGS:
            counts = [evaluation.scores[name].count for evaluation in (first, second)]
        if all(counts) and counts[0] != counts[1]:
            raise DataError(f"{where}: {name} is of {counts[0]} and of {counts[1]} examples; measure both on the same")


def _require_settings(where: str, part: str, names: tuple[str, ...], first: Evaluation, second: Evaluation) -> None:
    for name in names:
        values = first.settings.get(name), second.settings.get(name)
        if values[0] != values[1]:
            option = _OPTIONS.get(name, "--" + name.replace("_", "-"))
            raise DataError(
                f"{where}: the responses to {part} prompts were made or scored with another {option} "
                f"({values[0]} and {values[1]}); measure both in the same way"
            )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
