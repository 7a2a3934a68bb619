"""A comparison as Markdown."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Final

from safedelta_hf.compare.points import ComparisonFile, Point
from safedelta_hf.compare.rows import ALIGNED_ATTACK, ATTACK, Row, rows_of, scores_of, verdicts
from safedelta_hf.compare.scenarios import ALIGNED, WEIGHTS
from safedelta_hf.evaluation.result import Score


def markdown(file: ComparisonFile) -> str:
    """The whole comparison.

    Args:
        file: Its points.

    Returns:
        The command lines; which base does not refuse; for each kind of weights who reaches the goals where, if there
        are several scenarios, and a table for each scenario; what was left out.
    """
    commands = "\n".join(file.commands)
    shown = {weights: [point for point in file.points if point.weights == weights] for weights in WEIGHTS}
    tables = [f"## Fine-tuned: {WEIGHTS[weights]}\n\n{_tables(file, weights)}" for weights, own in shown.items() if own]
    left_out = "".join(f"* `{name}` left out: {reason}\n" for name, reason in file.left_out.items())
    return "\n".join(filter(None, [f"```bash\n{commands}\n```\n", _unaligned(file), *tables, left_out]))


_KEY: Final = "✓ reached on all seeds, (✓) on some, ✗ on none, · no such goal."


def _goal_table(file: ComparisonFile, rows: Sequence[Row], scenarios: Sequence[str]) -> str:
    judged = [
        name
        for name in scores_of(file, file.points)
        if any(name in verdicts(file, row.on(scenario)) for row in rows for scenario in scenarios)
    ]
    lines = [[_label(row), *(_marks(file, row.on(scenario), judged) for scenario in scenarios)] for row in rows]
    names = ", ".join(_words(name) for name in judged)
    return f"Goals, in this order: {names}. {_KEY}\n\n{_joined(['method', *scenarios], lines)}"


def _tables(file: ComparisonFile, weights: str) -> str:
    rows = rows_of(file, weights)
    scenarios = list(dict.fromkeys(point.scenario for row in rows for point in row.points))
    overview = [_goal_table(file, rows, scenarios)] if len(scenarios) > 1 else []
    return "\n".join([*overview, *(f"### {name}\n\n{_case_table(file, rows, name)}" for name in scenarios)])


def _case_table(file: ComparisonFile, rows: Sequence[Row], scenario: str) -> str:
    present = [row for row in rows if row.on(scenario)]
    scores = scores_of(file, [point for row in present for point in row.on(scenario)])
    lines = [[_label(row), *_cells(file, row.on(scenario), scores)] for row in present]
    return _joined(["method", *map(_words, scores), "strength found", "seconds"], lines)


def _cells(file: ComparisonFile, points: Sequence[Point], scores: Sequence[str]) -> Iterator[str]:
    judged = verdicts(file, points)
    for name in scores:
        shown = _shown([point.scores[name] for point in points if name in point.scores])
        yield f"{shown} {_mark(judged[name])}" if name in judged else shown
    found = [strength_found(point) for point in points if point.search is not None]
    yield " / ".join(found[:1] if len(set(found)) == 1 else found)
    seconds = fmean(point.seconds for point in points)
    yield f"{seconds:.{0 if seconds >= 10 else 1}f}" if seconds else ""


def strength_found(point: Point) -> str:
    """The strength that was measured for a model, as text.

    Args:
        point: A point with a search.

    Returns:
        A number, marked where even the strictest is not enough.
    """
    assert point.search is not None, "asked of those that have one"
    return f"{point.search['strength']:.3g}" + ("!" if point.search["outcome"] == "strictest fails" else "")


def _marks(file: ComparisonFile, points: Sequence[Point], names: Sequence[str]) -> str:
    judged = verdicts(file, points)
    return " ".join(_mark(judged[name]) if name in judged else "·" for name in names) if points else ""


def _mark(judged: Sequence[bool]) -> str:
    return "✓" if all(judged) else "(✓)" if any(judged) else "✗"


def _label(row: Row) -> str:
    return f"**{row.label}** (default)" if row.is_default else row.label


def _words(name: str) -> str:
    return name.replace("_", " ")


def _joined(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruled = [heads, ["---", *(":-:" for _ in heads[1:])], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled)


def _shown(scores: Sequence[Score]) -> str:
    if not scores:
        return "-"
    values = [score.value for score in scores]
    spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if max(values) > min(values) else ""
    return f"{fmean(values):.1%}{spread}"


def _unaligned(file: ComparisonFile) -> str:
    found = {
        point.scenario: point.scores[ATTACK].value
        for point in file.points
        if point.method == ALIGNED and point.scores[ATTACK].value > ALIGNED_ATTACK
    }
    return "".join(
        f"**{scenario}: the base itself does not refuse (attack success {value:.0%}), so there is nothing to keep and "
        "no goal of attack success. Compare on a base that refuses, or look at the prompts.**\n"
        for scenario, value in found.items()
    )
