"""What stops a pipeline: conditions on scores of named results, in a small part of Python's grammar."""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Final

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.evaluation.board.results import MEANINGS, Board, NamedResult
from safedelta_hf.evaluation.result import Score, shown

LONGEST: Final = 500
"""Characters of a condition."""

_COMPARISONS: Final[Mapping[type[ast.cmpop], Callable[[float, float], bool]]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_OPERATIONS: Final[Mapping[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_ENDS: Final = {"upper": "high", "lower": "low"}
_ROUNDING: Final = 1e-12
_GRAMMAR: Final = (
    "a condition compares scores (<, <=, >, >=), joined by and, or, not; beside numbers, + - * / and parentheses it "
    "knows a score of the judged result (attack_success), the same score of another (aligned), any score of any "
    'result (aligned.over_refusal, aligned["lm_eval/arc_easy/acc,none"]), and upper(...) and lower(...), the ends of '
    "an interval"
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a condition says.

    Attributes:
        condition: The condition, as it was given.
        fails: Whether it holds, so that the judged result fails.
        told: The figures that it met.
    """

    condition: str
    fails: bool
    told: str


def judged(condition: str, board: Board) -> Verdict:
    """Tell whether a condition holds.

    Args:
        condition: Such as "attack_success > aligned + 0.05"; docs/evaluation.md has the grammar. Nothing in it is run
            as code.
        board: The results.

    Returns:
        The verdict.

    Raises:
        ConfigurationError: It is no condition, names a score or a result that there is not, or can never hold.
    """
    reading = _Reading(condition, board)
    try:
        fails = reading.says(_parsed(condition))
    except RecursionError as error:
        raise ConfigurationError(f"gate {condition[:80]!r}: too deeply nested; give several conditions") from error
    return Verdict(condition=condition, fails=fails, told=", ".join(f"{k} {v}" for k, v in reading.met.items()))


def _parsed(condition: str) -> ast.expr:
    try:
        if len(condition) > LONGEST:
            raise ValueError(f"longer than {LONGEST} characters")
        return ast.parse(condition.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        hint = "; a share of 5 % is 0.05" if "%" in condition else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigurationError(f"gate {condition[:80]!r} cannot be read ({reason}){hint}: {_GRAMMAR}") from error


class _Reading:
    # Reads every part of a condition, also where one alone would decide, so that a wrong name never waits.

    def __init__(self, condition: str, board: Board) -> None:
        self.met: dict[str, str] = {}
        self._condition, self._board = condition, board

    def says(self, node: ast.expr) -> bool:
        if isinstance(node, ast.BoolOp):
            answers = [self.says(value) for value in node.values]
            return all(answers) if isinstance(node.op, ast.And) else any(answers)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not self.says(node.operand)
        if isinstance(node, ast.Compare):
            return self._compared(node)
        raise self._error(f"{ast.unparse(node)!r} says neither yes nor no")

    def _compared(self, node: ast.Compare) -> bool:
        named = dict.fromkeys(self._named(node))
        score = next(iter(named)) if len(named) == 1 else None
        if not named:
            raise self._error(f"{ast.unparse(node)!r} names no score; there are {', '.join(self._board.scores)}")
        sides = [self._number(side, score) for side in (node.left, *node.comparators)]
        self._require_possible(node, sides, named)
        found = []
        for index, kind in enumerate(node.ops):
            if type(kind) not in _COMPARISONS:
                raise self._error(f"{ast.unparse(node)!r} compares by something else than <, <=, > and >=")
            found.append(self._holds(kind, sides[index], sides[index + 1]))
        return all(found)

    @staticmethod
    def _holds(kind: ast.cmpop, left: float, right: float) -> bool:
        # 0.05 + 0.05 and what is counted as 0.1 are one number.
        if abs(left - right) <= _ROUNDING * max(abs(left), abs(right), 1.0):
            return isinstance(kind, ast.GtE | ast.LtE)
        return _COMPARISONS[type(kind)](left, right)

    def _require_possible(self, node: ast.Compare, sides: list[float], named: Mapping[str, None]) -> None:
        # "aligned + 5" is meant as five points, and would let everything pass.
        scaled = any(isinstance(one, ast.BinOp) and isinstance(one.op, ast.Mult | ast.Div) for one in ast.walk(node))
        units = {one.scores[name].unit for one in self._board.results for name in named if name in one.scores}
        if not scaled and units == {"share"} and any(abs(side) >= 2 for side in sides):
            raise self._error(f"{ast.unparse(node)!r}: a share is from 0 to 1, and five points are 0.05")

    def _named(self, node: ast.AST) -> Iterator[str]:
        for one in ast.walk(node):
            if isinstance(one, ast.Name) and one.id not in (*self._board.names, *_ENDS):
                yield one.id
            elif isinstance(one, ast.Attribute):
                yield one.attr
            elif isinstance(one, ast.Constant) and isinstance(one.value, str):
                yield one.value

    def _number(self, node: ast.expr, score: str | None) -> float:
        given = node.value if isinstance(node, ast.Constant) else None
        if isinstance(given, int | float) and not isinstance(given, bool):
            value = float(given) if abs(given) < 1e300 else inf
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            value = self._number(node.operand, score) * (-1 if isinstance(node.op, ast.USub) else 1)
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            sides = self._number(node.left, score), self._number(node.right, score)
            if isinstance(node.op, ast.Div) and not sides[1]:
                raise self._error(f"{ast.unparse(node)!r} divides by zero")
            value = _OPERATIONS[type(node.op)](*sides)
        elif isinstance(node, ast.Call):
            value = self._end(node, score)
        else:
            value = self._figure(node, score)[1].value
        if not isfinite(value):
            raise self._error(f"{ast.unparse(node)!r} is no finite number")
        return value

    def _end(self, node: ast.Call, score: str | None) -> float:
        called = node.func.id if isinstance(node.func, ast.Name) else ""
        if called not in _ENDS or len(node.args) != 1 or node.keywords:
            raise self._error(f"{ast.unparse(node)!r} is neither upper(score) nor lower(score)")
        label, found = self._figure(node.args[0], score)
        end = getattr(found, _ENDS[called])
        if end is None:
            raise self._error(f"{label} has no interval")
        self.met[f"{called}({label})"] = shown(found, end)
        return float(end)

    def _figure(self, node: ast.expr, score: str | None) -> tuple[str, Score]:
        one, name = self._place(node, score)
        if name not in one.scores:
            raise self._error(f"{one.name} has no score {name!r}; it has {', '.join(one.scores)}")
        label, found = f"{one.name}.{name}" if name in MEANINGS else f'{one.name}["{name}"]', one.scores[name]
        self.met[label] = shown(found, found.value)
        return label, found

    def _place(self, node: ast.expr, score: str | None) -> tuple[NamedResult, str]:
        names = self._board.names
        if isinstance(node, ast.Name) and node.id in names:
            if score is None:
                raise self._error(f"which score of {node.id!r}? Write {node.id}.attack_success, say")
            return self._board[node.id], score
        if isinstance(node, ast.Name):
            return self._board.subject, self._known(node.id)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._board.subject, self._known(node.value)
        of = node.value if isinstance(node, ast.Attribute | ast.Subscript) else None
        if isinstance(of, ast.Name) and of.id not in names:
            raise self._error(f"no result is called {of.id!r}; there are {', '.join(names)}")
        if isinstance(of, ast.Name) and isinstance(node, ast.Attribute):
            return self._board[of.id], self._known(node.attr)
        if isinstance(of, ast.Name) and isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return self._board[of.id], self._known(str(node.slice.value))
        raise self._error(f"{ast.unparse(node)!r} is no part of one: {_GRAMMAR}")

    def _known(self, name: str) -> str:
        if name not in self._board.scores:
            raise self._error(
                f"there is no score {name!r}; there are {', '.join(self._board.scores)}, of the results "
                f"{', '.join(self._board.names)}"
            )
        return name

    def _error(self, reason: str) -> ConfigurationError:
        return ConfigurationError(f"gate {self._condition!r}: {reason}")
