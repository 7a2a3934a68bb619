"""A board as dots with intervals: a panel for each score, a line for each model."""

import io
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from safedelta_hf.errors import figures_needed
from safedelta_hf.evaluation.board.results import LOWER, Board, NamedResult, meaning_of
from safedelta_hf.evaluation.result import Score, shown

WIDTH: Final = 5.6
"""Inches; a phone shows it at three fifths of that and still legibly."""
ROW: Final = 0.27
"""Inches between two models."""
PANEL: Final = 0.86
"""Inches of a panel's height for title and axis."""
FOOT: Final = 0.3
"""Inches below the panels."""


class Look(NamedTuple):
    """Colours of a figure, on paper or on a dark page."""

    ink: str
    faint: str
    other: str
    subject: str
    better: str
    paper: str


LIGHT: Final = Look("#1c1f23", "#d9dce1", "#5b6470", "#0b6e99", "#2b7a36", "white")
DARK: Final = Look("#e7e9ec", "#3a4048", "#a6afba", "#62c3ee", "#7fd18b", "#1b1f24")


def png(board: Board) -> bytes:
    """The figure as a picture.

    Args:
        board: The results.

    Returns:
        The bytes of a PNG file.
    """
    return _saved(board, LIGHT, "png")


def svg(board: Board, look: Look = LIGHT) -> bytes:
    """The figure as a drawing that stays sharp, letters drawn as lines.

    Args:
        board: The results.
        look: Its colours.

    Returns:
        The bytes of an SVG file.
    """
    return _saved(board, look, "svg")


def _saved(board: Board, look: Look, kind: str) -> bytes:
    with figures_needed():
        import matplotlib as mpl  # takes a while, and comes last

    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "safedelta", "svg.fonttype": "path"}):
        how = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 160}
        _figure(board, look).savefig(content, format=kind, facecolor=look.paper, **how)
    return content.getvalue()


def _figure(board: Board, look: Look) -> Any:  # noqa: ANN401 - matplotlib's
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    present = {name: [one for one in board.results if name in one.scores] for name in board.chief}
    heights = [PANEL + ROW * len(own) for own in present.values()]
    height = sum(heights) + FOOT
    layout = ConstrainedLayoutEngine(h_pad=0.09, rect=(0, FOOT / height, 1, 1 - FOOT / height))
    figure = Figure(figsize=(WIDTH, height), layout=layout)
    panels = figure.subplots(len(present), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, own) in zip(panels, present.items(), strict=True):
        _panel(axes, board, name, own, look)
    told = "Dot: measured. Line: 95 % interval for the prompts asked."
    figure.text(0.01, 0.008, told, fontsize=8, color=look.other)
    return figure


def _panel(axes: Any, board: Board, name: str, own: Sequence[NamedResult], look: Look) -> None:  # noqa: ANN401
    meaning, scores = meaning_of(name), [one.scores[name] for one in own]
    is_share = scores[0].unit == "share"
    axes.set_facecolor(look.paper)
    axes.set_title(meaning.title, loc="left", fontsize=9.5, fontweight="bold", color=look.ink, pad=6)
    _axis(axes, scores, is_share=is_share, look=look)
    if meaning.better:
        told = "← lower is better" if meaning.better == LOWER else "higher is better →"
        axes.set_xlabel(
            told, fontsize=8, color=look.better, labelpad=1, loc="left" if meaning.better == LOWER else "right"
        )
    for place, (one, score) in enumerate(zip(own, scores, strict=True)):
        colour = look.subject if one is board.subject else look.other
        if score.low is not None and score.high is not None:
            axes.plot([score.low, score.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(score.value, place, "o", color=colour, markersize=7, clip_on=False, zorder=3)
        told = shown(score, score.value)
        axes.text(1.015, place, told, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5, color=colour)
    axes.set_ylim(len(own) - 0.45, -0.55)
    axes.set_yticks(range(len(own)), [one.name for one in own], fontsize=9)
    for text, one in zip(axes.get_yticklabels(), own, strict=True):
        is_subject = one is board.subject
        text.set(color=look.subject if is_subject else look.ink, fontweight="bold" if is_subject else "normal")


def _axis(axes: Any, scores: Sequence[Score], *, is_share: bool, look: Look) -> None:  # noqa: ANN401
    if is_share:
        axes.set_xlim(-0.015, 1.015)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    else:
        ends = [x for score in scores for x in (score.low, score.value, score.high) if x is not None]
        room = 0.05 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
        axes.set_xlim(min(ends) - room, max(ends) + room)
        axes.text(
            1, -0.02, scores[0].unit, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=look.other
        )
    axes.tick_params(axis="x", labelsize=8, length=0, pad=2, colors=look.other)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=look.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(look.faint)
