"""The comparison itself: make each model, measure it, keep the point."""

from collections.abc import Sequence

from tqdm.auto import tqdm

from safedelta_hf.compare.candidates import Candidate, Candidates, Scenario
from safedelta_hf.compare.points import ComparisonFile, Point, key_of
from safedelta_hf.errors import NumericalError


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
    file.left_out = dict(candidates.left_out)
    pairs = [
        (scenario, candidate) for scenario in scenarios for candidate in (*scenario.baselines, *candidates.on(scenario))
    ]
    with tqdm(total=len(pairs), desc="Comparing", unit="model", disable=not progress) as bar:
        for scenario, candidate in pairs:
            bar.set_postfix_str(f"{scenario.name}, {candidate.method}")
            key = key_of(scenario.name, scenario.seed, candidate.method, candidate.settings)
            if key not in file:
                try:
                    file.add(_measured(scenario, candidate))
                except NumericalError as error:
                    # Of one strength, say: the others still tell something, and the table says that it is missing.
                    file.left_out[" ".join(map(str, key))] = str(error)
            bar.update()
    file.save()


def _measured(scenario: Scenario, candidate: Candidate) -> Point:
    made = candidate.make()
    return Point(
        scenario=scenario.name,
        seed=scenario.seed,
        method=candidate.method,
        settings=candidate.settings,
        scores=scenario.measure(made.model),
        seconds=made.seconds,
        search=made.search,
    )
