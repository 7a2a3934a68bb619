"""A comparison as dots: a line for each method, in panels for each scenario and score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from safedelta_hf.compare.points import ComparisonFile, Point
from safedelta_hf.compare.rows import ATTACK, KINDS, Row, goals, rows_of, scores_of, verdicts
from safedelta_hf.compare.scenarios import WEIGHTS
from safedelta_hf.errors import figures_needed
from safedelta_hf.evaluation.result import share_of

COLOURS: Final = dict(zip(KINDS, ("0.35", "#d95f02", "#7570b3", "#1b7aa6"), strict=True))
GOAL: Final = "#d9f0d3"
DEFAULT: Final = "#fff3c4"
BETTER: Final = "#2b7a36"

RANGE: Final = {"linewidth": 4.5, "alpha": 0.35, "solid_capstyle": "butt"}

ROW: Final = 0.18
"""Inches between two methods."""
PANEL: Final = 2.6
"""Inches of a panel's width."""
LABELS: Final = 2.3
"""Inches for the methods' names."""
TITLE: Final = 0.45
"""Inches of a panel's height for title and axis."""

LINEAR: Final = 0.05
"""Attack success up to which its axis is linear; above it is logarithmic."""
ATTACK_TICKS: Final[Sequence[float]] = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
SHARE_TICKS: Final[Sequence[float]] = (0, 0.25, 0.5, 0.75, 1)


def draw(file: ComparisonFile, folder: Path) -> list[Path]:
    """Draw a figure for each kind of weights that was trained.

    A dot is the mean over seeds, filled where the goal is reached on all of them; the thick bar is the range over
    seeds, the thin line Wilson's 95 % interval for the mean and the questions of one seed (all seeds ask the same).

    Args:
        file: The points.
        folder: Folder to write to.

    Returns:
        PNG files, `comparison-<weights>.png`.
    """
    written = []
    for weights in WEIGHTS:
        if rows := rows_of(file, weights):
            written.append(folder / f"comparison-{weights}.png")
            _figure(file, rows, WEIGHTS[weights]).savefig(written[-1], dpi=130)
    return written


def _figure(file: ComparisonFile, rows: Sequence[Row], trained: str) -> Any:  # noqa: ANN401 - matplotlib's
    with figures_needed():
        from matplotlib.figure import Figure  # takes a while, and comes last
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    points = [point for row in rows for point in row.points]
    scenarios, scores = list(dict.fromkeys(point.scenario for point in points)), scores_of(file, points)
    present = {name: [row for row in rows if row.on(name)] for name in scenarios}
    heights = [ROW * len(own) + TITLE for own in present.values()]
    size = (LABELS + PANEL * len(scores), sum(heights) + 1.4)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.04))
    grid = figure.subplots(len(scenarios), len(scores), squeeze=False, height_ratios=heights)
    for scenario, line in zip(scenarios, grid, strict=True):
        for score, axes in zip(scores, line, strict=True):
            _labels(axes, present[scenario], is_shown=axes is line[0])
            _panel(axes, file, present[scenario], scenario, score)
    seeds = len({point.seed for point in points})
    figure.suptitle(f"Fine-tuned: {trained}{f', {seeds} seeds' * (seeds > 1)}", fontsize=11, fontweight="bold")
    handles = _legend({row.kind for row in rows}, has_seeds=seeds > 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _panel(axes: Any, file: ComparisonFile, rows: Sequence[Row], scenario: str, score: str) -> None:  # noqa: ANN401
    measured = [point for row in rows for point in row.on(scenario) if score in point.scores]
    if not measured:
        axes.set_axis_off()
        told = f"{scenario}: no {_words(score)}"
        axes.text(0.5, 0.5, told, ha="center", color="0.5", fontsize=8.5, transform=axes.transAxes)
        return
    is_low = score == ATTACK or file.utilities[score] == "cost"
    _axis(axes, score)
    axes.set_title(f"{scenario}: {_words(score)}", loc="left", fontsize=8.5, fontweight="bold", pad=4)
    axes.set_title("← better" if is_low else "better →", loc="right", fontsize=8, color=BETTER, pad=4)
    _goal(axes, file, measured, score)
    for place, row in enumerate(rows):
        own = [point for point in row.on(scenario) if score in point.scores]
        if row.is_default:
            axes.axhspan(place - 0.5, place + 0.5, color=DEFAULT, zorder=-1, linewidth=0)
        if own:
            _dot(axes, file, place, row.kind, own, score)


def _axis(axes: Any, score: str) -> None:  # noqa: ANN401
    if score == ATTACK:
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=0.8)
    axes.set_xlim(*((-0.003, 1.2) if score == ATTACK else (-0.03, 1.03)))
    ticks = ATTACK_TICKS if score == ATTACK else SHARE_TICKS
    axes.set_xticks(ticks, [f"{100 * tick:g}{' %' * (tick == 1)}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.tick_params(axis="x", length=2, pad=1.5)
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _goal(axes: Any, file: ComparisonFile, measured: Sequence[Point], score: str) -> None:  # noqa: ANN401
    found = [goals(file, point)[score] for point in measured if score in goals(file, point)]
    if found:
        ends = (-1, fmean(found)) if score == ATTACK else (fmean(found), 2)
        axes.axvspan(*ends, color=GOAL, zorder=0, linewidth=0)


def _dot(axes: Any, file: ComparisonFile, place: int, kind: str, points: Sequence[Point], score: str) -> None:  # noqa: ANN401
    values, colour = [point.scores[score].value for point in points], COLOURS[kind]
    mean = share_of(fmean(values), min(point.scores[score].count for point in points))
    axes.plot([mean.low, mean.high], [place, place], color=colour, linewidth=0.9, solid_capstyle="butt")
    axes.plot([min(values), max(values)], [place, place], color=colour, **RANGE)
    is_filled = all(verdicts(file, points).get(score, [True]))
    axes.plot(mean.value, place, "o", color=colour, markersize=5, markerfacecolor=colour if is_filled else "white")


def _labels(axes: Any, rows: Sequence[Row], *, is_shown: bool) -> None:  # noqa: ANN401
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows] if is_shown else [], fontsize=8)
    axes.tick_params(axis="y", length=0)
    for text, row in zip(axes.get_yticklabels() if is_shown else [], rows, strict=False):
        text.set(color=COLOURS[row.kind], fontweight="bold" if row.is_default else "normal")


def _label(row: Row) -> str:
    return f"{row.label} (default)" if row.is_default else row.label


def _legend(kinds: set[str], *, has_seeds: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks: list[tuple[str, Mapping[str, Any]]] = [
        (KINDS[kind], {"marker": "o", "linestyle": "", "color": colour})
        for kind, colour in COLOURS.items()
        if kind in kinds
    ]
    missed = "goal missed on a seed" if has_seeds else "goal missed"
    looks.append((missed, {"marker": "o", "linestyle": "", "color": "0.35", "markerfacecolor": "white"}))
    if has_seeds:
        looks.append(("from the lowest to the highest seed", {"color": "0.35", **RANGE}))
    looks.append(("95 % interval for the questions asked (Wilson)", {"linewidth": 0.9, "color": "0.35"}))
    return [*(Line2D([], [], label=label, **look) for label, look in looks), Patch(color=GOAL, label="goal")]


def _words(name: str) -> str:
    return name.replace("_", " ")
