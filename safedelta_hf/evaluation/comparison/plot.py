"""A comparison as a picture: attack success against what the model is good for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from safedelta_hf.evaluation.comparison.points import ComparisonFile, Point
from safedelta_hf.evaluation.comparison.table import ATTACK, ATTACK_SLACK, grouped

MARKERS: Final = "osD^vPX*hp<>"
SIDE: Final = 4.0
"""Inches."""

Place = tuple[float, float]

Look = Mapping[str, Any]
"""Colour and marker of a method."""


def draw(file: ComparisonFile, path: Path) -> bool:
    """Draw a panel for each subject and utility: baselines as points, each rule as a line over its strengths.

    Where there are several seeds, their mean is drawn. A rule's line runs from mild to strict; its large marker is the
    measured strength, a hollow one the measured strength with retention.

    Args:
        file: The points.
        path: PNG file to write.

    Returns:
        Whether there was a utility to draw.
    """
    panels = _panels(file)
    if not panels:
        return False
    methods = list(dict.fromkeys(point.method for point in file.points))
    looks: dict[str, Look] = {
        name: {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]} for index, name in enumerate(methods)
    }
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(SIDE * columns, SIDE * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (subject, utility) in zip(grid.flat, panels, strict=False):
        _panel(axes, file, subject, utility, looks)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles = [Line2D([], [], linestyle="", label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, fontsize=8)
    figure.savefig(path, dpi=110)
    return True


def _panels(file: ComparisonFile) -> list[tuple[str, str]]:
    return [
        (subject, utility)
        for subject in dict.fromkeys(point.subject for point in file.points)
        for utility, meaning in file.utilities.items()
        if meaning != "cost" and any(utility in point.scores for point in file.points if point.subject == subject)
    ]


def _panel(axes: Any, file: ComparisonFile, subject: str, utility: str, looks: Mapping[str, Look]) -> None:  # noqa: ANN401
    groups = [
        group for group in grouped(file.points).values() if group[0].subject == subject and utility in group[0].scores
    ]
    for method, look in looks.items():
        own = [group for group in groups if group[0].method == method]
        if any("strength" in group[0].settings for group in own):
            _frontier(axes, own, utility, look)
        elif own:
            places = [_place(group, utility) for group in own]
            axes.plot(*zip(*places, strict=True), linestyle="", markersize=7, **look)
    aligned = [fmean(point.scores[ATTACK].value for point in group) for group in groups if group[0].method == "aligned"]
    if aligned:
        axes.axvspan(-0.05, aligned[0] + ATTACK_SLACK, color="0.9", zorder=0)
    axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), title=subject)
    axes.set(xlabel="attack success", ylabel=utility.replace("_", " "))


def _frontier(axes: Any, groups: Sequence[Sequence[Point]], utility: str, look: Look) -> None:  # noqa: ANN401
    plain = [group for group in groups if not group[0].settings.get("retention")]
    line = sorted(plain, key=_mean_strength)
    if line:
        places = [_place(group, utility) for group in line]
        axes.plot(*zip(*places, strict=True), linewidth=1, markersize=3, alpha=0.7, **look)
    for group in groups:
        if group[0].search is not None:
            hollow = {"markerfacecolor": "none"} if group[0].settings.get("retention") else {}
            axes.plot(*_place(group, utility), markersize=10, **look, **hollow)


def _place(group: Sequence[Point], utility: str) -> Place:
    return (
        fmean(point.scores[ATTACK].value for point in group),
        fmean(point.scores[utility].value for point in group),
    )


def _mean_strength(group: Sequence[Point]) -> float:
    return fmean(point.settings["strength"] if point.search is None else point.search["strength"] for point in group)
