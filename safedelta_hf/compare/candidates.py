"""The rules that take part in a comparison, and the comparison itself: make each model, measure it, keep the point."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from safedelta_hf.compare.points import ComparisonFile, Point, key_of
from safedelta_hf.compare.scenarios import WEIGHTS, Candidate, Scenario
from safedelta_hf.errors import ConfigurationError, NumericalError
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.rules import RULES, Rule

NEEDS_DENSE: Final = "it needs whole weights, and an adapter keeps its rank; merge the adapter to compare it"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rules that take part, at each strength, with and without ordinary data.

    Attributes:
        rules: Each rule at one strength.
        ordinary_weights: Weights of the ordinary data; 0 is without.
        left_out: Rules that do not take part, with the reason.
    """

    rules: tuple[Rule, ...]
    ordinary_weights: tuple[float, ...]
    left_out: Mapping[str, str]

    def on(self, scenario: Scenario) -> Iterator[Candidate]:
        """All of them on one scenario.

        Args:
            scenario: The scenario.

        Yields:
            Candidates, rule by rule.
        """
        for rule in filter(scenario.takes, self.rules):
            # Where nothing is read from the moments, ordinary data changes nothing.
            for weight in self.ordinary_weights if rule.reads_moments else (0.0,):
                yield scenario.adjusted(rule, weight)


def choose_candidates(
    names: Sequence[str],
    strengths: Sequence[float | Literal["auto"]] | None,
    ordinary_weights: Sequence[float],
    *,
    has_task: bool,
    steps: int = 0,
) -> Candidates:
    """Find the rules that can take part in a comparison on one fine-tuned model.

    Args:
        names: Rules, out of `RULES`.
        strengths: Numbers or "auto"; None for "auto" and the rule's own default, where that is a number (of
            `SafeDelta` it is the published one).
        ordinary_weights: Weights of the ordinary data; 0 is without.
        has_task: Whether there are task data.
        steps: How many strengths to take besides, spread over each rule's search range.

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
            own = kind().strength
        except ConfigurationError as error:
            left_out[name] = str(error)
            continue
        usual = ["auto", own] if isinstance(own, float) else ["auto"]
        rules.extend(kind(strength=strength) for strength in dict.fromkeys([*(strengths or usual), *grid(kind, steps)]))
    if not rules:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigurationError(f"no rule can take part ({reasons})")
    return Candidates(rules=tuple(rules), ordinary_weights=tuple(dict.fromkeys(ordinary_weights)), left_out=left_out)


def grid(rule: type[Rule], count: int) -> list[float]:
    """Strengths that draw a rule's frontier, from mild to strict.

    Args:
        rule: The rule.
        count: How many.

    Returns:
        Strengths of three digits, spread evenly over the logarithm of the rule's search range, without its ends.
    """
    mild, strict = map(math.log, rule.search_range)
    steps = [(index + 1) / (count + 1) for index in range(count)]
    return [float(f"{math.exp(mild + step * (strict - mild)):.3g}") for step in steps]


def compare(
    scenarios: Sequence[Scenario], candidates: Candidates, file: ComparisonFile, *, progress: bool = True
) -> None:
    """Measure every baseline and every rule on every scenario, but for the points that are in the file already.

    A candidate whose matrices cannot be factorised is named among those left out, and tried again by the next run.

    Args:
        scenarios: What is compared on.
        candidates: The rules.
        file: Where the points are kept; each is on disk before the next is made.
        progress: Whether to show a progress bar.
    """
    file.left_out = {
        **candidates.left_out,
        **{
            f"{rule.name} ({WEIGHTS[scenario.weights]})": NEEDS_DENSE
            for scenario in scenarios
            for rule in candidates.rules
            if not scenario.takes(rule)
        },
    }
    pairs = [
        (scenario, candidate) for scenario in scenarios for candidate in (*scenario.baselines, *candidates.on(scenario))
    ]
    with progress_bar(total=len(pairs), desc="Comparing", unit="model", disable=not progress) as bar:
        for scenario, candidate in pairs:
            bar.set_postfix_str(f"{scenario.name}, {scenario.weights}, {candidate.method}")
            key = key_of(scenario.name, scenario.weights, scenario.seed, candidate.method, candidate.settings)
            if key not in file:
                try:
                    file.add(_measured(scenario, candidate))
                except NumericalError as error:
                    # Of one strength, say: the others still tell something, and the table says that it is missing.
                    file.left_out[" ".join(map(str, key))] = str(error)
            bar.update()


def _measured(scenario: Scenario, candidate: Candidate) -> Point:
    made = candidate.make()
    return Point(
        scenario=scenario.name,
        seed=scenario.seed,
        weights=scenario.weights,
        method=candidate.method,
        settings=candidate.settings,
        scores=scenario.measure(made.model),
        seconds=made.seconds,
        search=made.search,
    )
