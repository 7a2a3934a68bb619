"""Evaluations of several models side by side: what a review board looks at, and what a pipeline stops at."""

from safedelta_hf.evaluation.board.gates import Verdict, judged
from safedelta_hf.evaluation.board.paired import Difference, paired
from safedelta_hf.evaluation.board.results import Board, Meaning, NamedResult

__all__ = ["Board", "Difference", "Meaning", "NamedResult", "Verdict", "judged", "paired"]
