"""What is compared: ways to make a model from a base, a fine-tuned model and data."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.result import Score
from safedelta_hf.model.adjust import adjust_model
from safedelta_hf.modules.names import parameter_names
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.profile.retention import with_retention
from safedelta_hf.rules import RULES, Rule

ALIGNED: Final = "aligned"
FINE_TUNED: Final = "fine-tuned"
DEFAULT_GRID: Final = 3
"""Strengths beside "auto", spread evenly over the logarithm of a rule's search range, without its ends."""


class CandidateModel(NamedTuple):
    """A model that is ready to be measured.

    Attributes:
        model: The model; the next candidate may change it.
        seconds: Time that making it took.
        search: How the strength was found, as plain values; None where it was given.
    """

    model: PreTrainedModel
    seconds: float
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to make a model.

    Attributes:
        method: As in `Point`.
        settings: What tells it from others of the same method.
        make: Makes the model.
    """

    method: str
    settings: Mapping[str, Any]
    make: Callable[[], CandidateModel]


class TunedModel:
    """A fine-tuned model that is adjusted in place, again and again.

    Args:
        model: The model; a copy of its weights is kept in host memory.
        seconds: Time that the fine-tuning took, where it was measured.
    """

    def __init__(self, model: PreTrainedModel, seconds: float = 0.0) -> None:
        self._model = model
        self._weights = {name: parameter.detach().cpu().clone() for parameter, name in parameter_names(model).items()}
        self.seconds = seconds

    def restored(self) -> PreTrainedModel:
        """The model as the fine-tuning left it.

        Returns:
            The one model, changed in place.
        """
        with torch.no_grad():
            for parameter, name in parameter_names(self._model).items():
                parameter.copy_(self._weights[name])
        return self._model


class Scenario(Protocol):
    """A base, a model that was fine-tuned from it, the data of both, and a measure of models.

    What is expensive is made when it is first asked for.
    """

    @property
    def name(self) -> str:
        """As in `Point`."""
        ...

    @property
    def seed(self) -> int | None:
        """As in `Point`."""
        ...

    @property
    def base(self) -> nn.Module:
        """The base model."""
        ...

    @property
    def tuned(self) -> TunedModel:
        """The fine-tuned model."""
        ...

    @property
    def profile(self) -> SafetyProfile:
        """Profile of the base on safety data, part of it held out."""
        ...

    @property
    def task(self) -> SafetyProfile | None:
        """Profile of the base on the task data, if there are any."""
        ...

    @property
    def ordinary(self) -> SafetyProfile | None:
        """Profile of the base on ordinary data, if there are any."""
        ...

    @property
    def baselines(self) -> Sequence[Candidate]:
        """What the rules are compared with."""
        ...

    def measure(self, model: PreTrainedModel) -> Mapping[str, Score]:
        """Measure a model.

        Args:
            model: The model.

        Returns:
            Scores by name, `attack_success` among them.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rules that take part, at each strength, with and without retention.

    Attributes:
        rules: Each rule at one strength.
        retentions: Weights of the ordinary data; 0 is without.
        left_out: Rules that do not take part, with the reason.
    """

    rules: tuple[Rule, ...]
    retentions: tuple[float, ...]
    left_out: Mapping[str, str]

    def on(self, scenario: Scenario) -> Iterator[Candidate]:
        """All of them on one scenario.

        Args:
            scenario: The scenario.

        Yields:
            Candidates, rule by rule.
        """
        for rule in self.rules:
            # Where nothing is read from the moments, retention changes nothing.
            for weight in self.retentions if rule.reads_moments else (0.0,):
                yield _candidate(scenario, rule, weight)


def choose_candidates(
    names: Sequence[str],
    strengths: Sequence[float | Literal["auto"]] | None,
    retentions: Sequence[float],
    *,
    has_task: bool,
) -> Candidates:
    """Find the rules that can take part in a comparison on one fine-tuned model.

    Args:
        names: Rules, out of `RULES`.
        strengths: Numbers or "auto"; None for "auto" and a grid over each rule's search range.
        retentions: Weights of the ordinary data; 0 is without.
        has_task: Whether there are task data.

    Returns:
        Those that can, and the reasons why the others cannot.

    Raises:
        ConfigurationError: A strength is outside a rule's range, or no rule can take part.
    """
    rules: list[Rule] = []
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(names):
        kind = RULES[name]
        if kind.needs_task and not has_task:
            left_out[name] = "it weighs what the fine-tuning data uses, and there are no task data"
            continue
        try:
            kind()
        except ConfigurationError as error:
            left_out[name] = str(error)
            continue
        rules.extend(kind(strength=strength) for strength in strengths or ["auto", *grid(kind)])
    if not rules:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigurationError(f"no rule can take part ({reasons})")
    return Candidates(rules=tuple(rules), retentions=tuple(dict.fromkeys(retentions)), left_out=left_out)


def grid(rule: type[Rule], count: int = DEFAULT_GRID) -> list[float]:
    """Strengths that draw a rule's frontier, from mild to strict.

    Args:
        rule: The rule.
        count: How many.

    Returns:
        Strengths of three digits.
    """
    mild, strict = map(math.log, rule.search_range)
    steps = [(index + 1) / (count + 1) for index in range(count)]
    return [float(f"{math.exp(mild + step * (strict - mild)):.3g}") for step in steps]


def _candidate(scenario: Scenario, rule: Rule, weight: float) -> Candidate:
    def make() -> CandidateModel:
        model, profile = scenario.tuned.restored(), scenario.profile
        if weight:
            assert scenario.ordinary is not None, "checked before anything was made"
            profile = with_retention(profile, scenario.ordinary, weight)
        task = scenario.task if rule.needs_task else None
        started = time.perf_counter()
        with warnings.catch_warnings():
            # The table says so.
            warnings.filterwarnings("ignore", message=".*Even the strictest strength.*")
            report = adjust_model(model, base=scenario.base, profile=profile, rule=rule, task=task, progress=False)
        seconds = time.perf_counter() - started
        return CandidateModel(model, seconds, None if report.search is None else asdict(report.search))

    return Candidate(method=rule.name, settings={**rule.settings, "retention": weight}, make=make)
