"""A comparison as dots: a line for each method, a row of panels for each scenario, a panel for each score."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from safedelta_hf.compare.points import ComparisonFile, Point
from safedelta_hf.compare.rows import (
    ATTACK,
    ATTACK_SLACK,
    GAIN_SHARE,
    KEPT_SHARE,
    KINDS,
    Row,
    goals,
    rows_of,
    scores_of,
    verdicts,
)
from safedelta_hf.compare.scenarios import ALIGNED, FINE_TUNED, WEIGHTS
from safedelta_hf.errors import figures_needed
from safedelta_hf.evaluation.result import share_of

COLOURS: Final = dict(zip(KINDS, ("0.35", "#b35900", "#7570b3", "#1b7aa6", "#8a2f7d"), strict=True))
GOAL: Final = "#d9f0d3"
DEFAULT: Final = "#fff3c4"
BETTER: Final = "#2b7a36"

RANGE: Final = {"linewidth": 4.5, "alpha": 0.35, "solid_capstyle": "butt"}

TITLES: Final[Mapping[str, str]] = {
    ATTACK: "Harmful requests answered",
    "new_skill": "New skill: right answers",
    "task_accuracy": "The task: right answers",
    "old_skills": "Old skills: right answers",
    "over_refusal": "Harmless requests refused",
}
"""What scores are, for who has not read the documentation."""

LABELS: Final[Mapping[str, str]] = {
    ALIGNED: "before fine-tuning (aligned)",
    FINE_TUNED: "fine-tuned, not repaired",
}

ROW: Final = 0.19
"""Inches between two methods."""
PANEL: Final = 2.7
"""Inches of a panel's width."""
NAMES: Final = 2.4
"""Inches for the methods' names."""
TITLE: Final = 0.75
"""Inches of a scenario's height for titles and axis."""
LINE: Final = 0.19
"""Inches of a line of the legend, or of a title that takes several."""
LETTER: Final = 0.078
"""Inches of a letter of a title, about."""

LINEAR: Final = 0.05
"""Attack success up to which its axis is linear; above it is logarithmic."""
ATTACK_TICKS: Final[Sequence[float]] = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
SHARE_TICKS: Final[Sequence[float]] = (0, 0.25, 0.5, 0.75, 1)


def draw(file: ComparisonFile, folder: Path, described: Mapping[str, str] | None = None) -> list[Path]:
    """Draw a figure for each kind of weights that was trained.

    A dot is the mean over seeds, filled where the goal is reached on all of them; the thick bar is the range over
    seeds, the thin line Wilson's 95 % interval for the mean and the questions of one seed (all seeds ask the same).

    Args:
        file: The points.
        folder: Folder to write to.
        described: What a scenario's model was fine-tuned on, in words, by its name.

    Returns:
        PNG files, `comparison-<weights>.png`.
    """
    written = []
    for weights in WEIGHTS:
        if rows := rows_of(file, weights):
            written.append(folder / f"comparison-{weights}.png")
            _figure(file, rows, WEIGHTS[weights], described or {}).savefig(written[-1], dpi=130)
    return written


def _figure(file: ComparisonFile, rows: Sequence[Row], trained: str, described: Mapping[str, str]) -> Any:  # noqa: ANN401 - matplotlib's
    with figures_needed():
        from matplotlib.figure import Figure  # takes a while, and comes last
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    points = [point for row in rows for point in row.points]
    scenarios, scores = list(dict.fromkeys(point.scenario for point in points)), scores_of(file, points)
    present = {name: [row for row in rows if row.on(name)] for name in scenarios}
    width = max(NAMES + PANEL * len(scores), 6.4)
    heads = {name: _wrapped(_head(name, described), width) for name in scenarios}
    seeds = len({point.seed for point in points})
    title = f"Safety and skills after fine-tuning {trained}{f': mean of {seeds} seeds' * (seeds > 1)}"
    legend = _legend(file, rows, points, has_seeds=seeds > 1)
    columns = 2 if width > 8 else 1
    foot = LINE * (-(-len(legend) // columns)) + 0.25
    heights = [ROW * len(own) + TITLE + LINE * heads[name].count("\n") for name, own in present.items()]
    figure = Figure(figsize=(width, sum(heights) + foot + 0.4), layout=ConstrainedLayoutEngine(wspace=0.04))
    figure.suptitle(title, fontsize=11.5, fontweight="bold")
    figure.legend(handles=legend, loc="outside lower left", ncols=columns, fontsize=8, frameon=False)
    bands = figure.subfigures(len(scenarios), 1, squeeze=False, height_ratios=heights)[:, 0]
    for band, scenario in zip(bands, scenarios, strict=True):
        band.suptitle(heads[scenario], x=0.008, ha="left", fontsize=9, color="0.2")
        line = band.subplots(1, len(scores), squeeze=False)[0]
        for score, axes in zip(scores, line, strict=True):
            _labels(axes, present[scenario], is_shown=axes is line[0])
            _panel(axes, file, present[scenario], scenario, score)
    return figure


def _head(scenario: str, described: Mapping[str, str]) -> str:
    return f"Fine-tuned on “{scenario}”: {described[scenario]}" if scenario in described else f"Model: {scenario}"


def _wrapped(text: str, inches: float) -> str:
    return textwrap.fill(text, int(inches / LETTER))


def _panel(axes: Any, file: ComparisonFile, rows: Sequence[Row], scenario: str, score: str) -> None:  # noqa: ANN401
    measured = [point for row in rows for point in row.on(scenario) if score in point.scores]
    if not measured:
        axes.set_axis_off()
        told = f"no {score.replace('_', ' ')} here"
        axes.text(0.5, 0.5, told, ha="center", color="0.5", fontsize=8.5, transform=axes.transAxes)
        return
    is_low = score == ATTACK or file.utilities[score] == "cost"
    _axis(axes, score)
    axes.set_title(TITLES.get(score, score.replace("_", " ")), loc="left", fontsize=8.5, fontweight="bold", pad=4)
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
    look = {"color": colour, "markersize": 5, "markerfacecolor": colour if is_filled else "white"}
    axes.plot(mean.value, place, "o", clip_on=False, **look)


def _labels(axes: Any, rows: Sequence[Row], *, is_shown: bool) -> None:  # noqa: ANN401
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows] if is_shown else [], fontsize=8)
    axes.tick_params(axis="y", length=0)
    for text, row in zip(axes.get_yticklabels() if is_shown else [], rows, strict=False):
        text.set(color=COLOURS[row.kind], fontweight="bold" if row.is_default else "normal")


def _label(row: Row) -> str:
    label = LABELS.get(row.label, row.label)
    return f"{label} (default)" if row.is_default else label


def _legend(file: ComparisonFile, rows: Sequence[Row], points: Sequence[Point], *, has_seeds: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds, found = {row.kind for row in rows}, {name for point in points for name in goals(file, point)}
    looks: list[tuple[str, Mapping[str, Any]]] = [
        (KINDS[kind], {"marker": "o", "linestyle": "", "color": colour})
        for kind, colour in COLOURS.items()
        if kind in kinds
    ]
    if found:
        missed = "open: goal missed on a seed" if has_seeds else "open: goal missed"
        looks.append((missed, {"marker": "o", "linestyle": "", "color": "0.35", "markerfacecolor": "white"}))
    if has_seeds:
        looks.append(("from the lowest to the highest seed", {"color": "0.35", **RANGE}))
    looks.append(("95 % interval for the questions asked (Wilson)", {"linewidth": 0.9, "color": "0.35"}))
    handles: list[Any] = [Line2D([], [], label=label, **look) for label, look in looks]
    if found:
        told = "; ".join(_goal_words(name, file) for name in (ATTACK, *file.utilities) if name in found)
        handles.append(Patch(color=GOAL, label=f"goal: {told}"))
    if any(row.is_default for row in rows):
        handles.append(Patch(color=DEFAULT, label="what is used where nothing else is asked for"))
    handles.append(Line2D([], [], linestyle="", label=f"(harmful requests: the axis is stretched below {LINEAR:.0%})"))
    return handles


def _goal_words(name: str, file: ComparisonFile) -> str:
    if name == ATTACK:
        return f"at most {100 * ATTACK_SLACK:g} points more answered than before"
    if file.utilities[name] == "gain":
        return f"{GAIN_SHARE:.0%} of what was gained"
    return f"{KEPT_SHARE:.0%} of the {name.replace('_', ' ')}"
