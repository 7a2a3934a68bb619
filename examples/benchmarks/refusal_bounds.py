"""How often the bound on lost refusals holds, and what a search for a strength costs, on simulated refusals.

python examples/benchmarks/refusal_bounds.py --runs 2000
"""

import argparse
import math
import random
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from safedelta_hf.adjust.search import search_strength, strengths_of
from safedelta_hf.data.refusals import Drift
from safedelta_hf.rules import AutoStrength, Rule, TaskRidge

Measure = Callable[[float], Drift]


def population(rng: random.Random, noise: float) -> tuple[Callable[[float], float], Callable[[int], Measure]]:
    """Refusals each of which returns at a strength of its own, log-normal, and flickers about it.

    Args:
        rng: Draws the population, and later its refusals and their flicker.
        noise: Standard deviation, in decades of strength, of a flicker that is drawn anew at each strength.

    Returns:
        The share of all refusals that is lost at a strength; what draws so many of them, and gives what is lost of
        these at a strength, the same whenever it is asked for.
    """
    centre, width = rng.uniform(-1.5, 2.5), rng.uniform(0.1, 0.6)

    def share(strength: float) -> float:
        if not strength:
            return 1.0
        return 0.5 * math.erfc((math.log10(strength) - centre) / math.hypot(width, noise) / math.sqrt(2))

    def drawn(refusals: int) -> Measure:
        thresholds = [rng.gauss(centre, width) for _ in range(refusals)]
        seen: dict[float, Drift] = {}

        def measure(strength: float) -> Drift:
            if strength not in seen:
                place = math.log10(strength) if strength else -math.inf
                lost = sum(place + rng.gauss(0, noise) < one for one in thresholds)
                seen[strength] = Drift(lost=lost, probability_lost=0.0)
            return seen[strength]

        return measure

    return share, drawn


def in_sequence(rule: Rule, auto: AutoStrength, measure: Measure, allowed: int) -> float | None:
    """Try every strength from the strictest on, until one loses too many; the one before it, if there is one."""
    chosen = None
    for strength in [*strengths_of(rule, auto.precision), rule.mildest]:
        if measure(strength).lost > allowed:
            break
        chosen = strength
    return chosen


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    options = parser.parse_args()
    table = Table("refusals", "flicker", "holds, in sequence", "holds, searched", "same strength", "evaluations")
    rule, auto, rng = TaskRidge(), AutoStrength(), random.Random(0)
    for refusals in (30, 59, 150, 400):
        for noise in (0.0, 0.03, 0.1, 0.3):
            kept, same, trials = [0, 0], 0, 0
            for _ in range(options.runs):
                share, drawn = population(rng, noise)
                measure = drawn(refusals)
                found = search_strength(rule, auto, measure, refusals)
                walked = in_sequence(rule, auto, measure, found.allowed)
                chosen = None if found.outcome == "strictest fails" else found.strength
                for number, strength in enumerate((walked, chosen)):
                    kept[number] += strength is None or share(strength) <= found.bound
                same, trials = same + (walked == chosen), trials + len(found.trials)
            shares = [f"{count / options.runs:.1%}" for count in (*kept, same)]
            table.add_row(str(refusals), f"{noise:g}", *shares, f"{trials / options.runs:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
