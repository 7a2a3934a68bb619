"""Draw what is gained on the testbed, for a reader who knows nothing yet: the figure at the top of the README.

safedelta compare --rule task_ridge --method polish --seed 0 --seed 1 --seed 2 --output polished
python examples/benchmarks/gains.py polished/results.jsonl --output docs    # gains-light.png, gains-dark.png

A bar is the mean over seeds, the line on it goes from the lowest seed to the highest.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

CASES = {
    "benign": "500 harmless examples,\nin another manner",
    "identity": "100 harmless requests\nto an obedient persona",
    "skill": "1000 examples\nof a new skill",
    "mixed": "1000 of a new skill,\n100 harmful among them",
    "harmful": "100 harmful examples",
}
METHODS = {
    "fine-tuned": "fine-tuned",
    "task_ridge": "adjusted (the callback)",
    "task_ridge, then polished": "adjusted and polished",
}
SCORES = {
    "attack_success": "Harmful requests answered",
    "new_skill": "New skill",
    "old_skills": "Old skills",
}
LOOKS = {
    "light": {"back": "#ffffff", "text": "#1f2328", "faint": "#8c959f", "bars": ("#d1622b", "#3b82c4", "#1f9d77")},
    "dark": {"back": "#0d1117", "text": "#e6edf3", "faint": "#7d8590", "bars": ("#f0883e", "#58a6ff", "#3fb98f")},
}
HEIGHT = 0.26
"""Of one bar; between two cases lies 1."""


def read_points(file: Path, weights: str) -> dict:
    """The values of each case, method and score, one for each seed."""
    found = defaultdict(list)
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        point = line.get("point")
        if point and point["weights"] == weights:
            for score, told in point["scores"].items():
                found[point["scenario"], point["method"], score].append(told["value"])
    return found


def told(share: float) -> str:
    """A share as people write it."""
    percent = 100 * share
    return f"{percent:.1f} %" if 0 < percent < 2 or 99 < percent < 100 else f"{percent:.0f} %"


def draw(points: dict, look: dict) -> Figure:
    """The figure: a row for each case, a panel for each score."""
    figure = Figure(figsize=(9.6, 5.1), layout="constrained", facecolor=look["back"])
    panels = figure.subplots(1, len(SCORES), sharey=True)
    for axes, (score, title) in zip(panels, SCORES.items(), strict=True):
        dress(axes, look, title, "less is better" if score == "attack_success" else "more is better")
        for row, case in enumerate(CASES):
            bars(axes, look, points, row, case, score)
    panels[0].set_yticks(range(len(CASES)), CASES.values(), color=look["text"], fontsize=9.5)
    panels[0].set_ylim(len(CASES) - 0.45, -0.55)
    figure.suptitle("Fine-tuned on ...", x=0.01, ha="left", color=look["text"], fontsize=11, fontweight="bold")
    handles = [
        panels[0].barh(0, 0, color=colour, label=label)
        for label, colour in zip(METHODS.values(), look["bars"], strict=True)
    ]
    handles += panels[0].plot([], [], color=look["faint"], linestyle=":", label="the aligned model before")
    figure.legend(
        handles=handles, loc="outside lower center", ncols=4, frameon=False, labelcolor=look["text"], fontsize=9.5
    )
    return figure


def dress(axes: object, look: dict, title: str, better: str) -> None:
    """Title, limits and colours of a panel."""
    axes.set(facecolor=look["back"], xlim=(0, 1.2), xticks=())
    axes.set_title(title, loc="left", color=look["text"], fontsize=11, fontweight="bold", pad=18)
    axes.annotate(
        better, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=look["faint"], fontsize=9
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.spines["left"].set(visible=True, color=look["faint"])


def bars(axes: object, look: dict, points: dict, row: int, case: str, score: str) -> None:
    """What one case has of one score."""
    if not points[case, "fine-tuned", score]:
        axes.text(0.02, row, "none was taught", color=look["faint"], fontsize=9, va="center")
        return
    if before := points[case, "aligned", score]:
        axes.plot([fmean(before)] * 2, [row - 0.43, row + 0.43], color=look["faint"], linestyle=":", linewidth=1.2)
    for place, (method, colour) in enumerate(zip(METHODS, look["bars"], strict=True)):
        values, height = points[case, method, score], row + (place - 1) * (HEIGHT + 0.02)
        axes.barh(height, fmean(values), HEIGHT, color=colour)
        axes.plot([min(values), max(values)], [height] * 2, color=look["text"], linewidth=1)
        label = axes.text(max(values) + 0.02, height, told(fmean(values)), color=look["text"], fontsize=8.5)
        label.set(va="center_baseline", path_effects=[withStroke(linewidth=3, foreground=look["back"])])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--output", type=Path, default=Path())
    parser.add_argument("--weights", default="full")
    given = parser.parse_args()
    measured = read_points(given.results, given.weights)
    for name, chosen in LOOKS.items():
        draw(measured, chosen).savefig(given.output / f"gains-{name}.png", dpi=160)
