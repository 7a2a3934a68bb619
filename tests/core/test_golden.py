"""The published code's own outputs."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from safedelta_hf.core.compensation import joint_response, sequential_response
from safedelta_hf.core.curvature import Curvature, factorise
from safedelta_hf.core.selection import budget, select_entries
from safedelta_hf.core.transform import KeepColumns
from safedelta_hf.deltas.dense import MatrixDelta
from safedelta_hf.records import Role
from safedelta_hf.rules import LayerMoments, SafeDelta
from tests.fixtures import oracles

FOLDER = Path(__file__).parent.parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            self.settings = {key: float(value) for key, value in file.metadata().items() if key != "note"}
            base, tuned, self.inputs, adjusted = (file.get_tensor(k) for k in ("base", "tuned", "inputs", "adjusted"))
        self.delta = tuned - base
        self.adjusted = adjusted - base
        self.kept = adjusted == tuned

    def hessian(self) -> Tensor:
        return 2 / self.settings["sequences"] * self.inputs.T @ self.inputs

    def curvature(self) -> Curvature:
        return factorise(self.hessian(), self.settings["damping"])

    def rule(self, **changes: object) -> SafeDelta:
        settings = {key: self.settings[key] for key in ("strength", "damping")}
        return SafeDelta(**settings, block=int(self.settings["block"]), **changes)


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def by_kept_pattern(golden: Golden, response_of) -> Tensor:
    """Compensate rows that keep the same entries together: all but the column that the budget cut."""
    result = torch.zeros_like(golden.delta)
    for pattern in torch.unique(golden.kept, dim=0):
        rows = (golden.kept == pattern).all(1)
        transform = KeepColumns(kept=pattern, response=response_of(golden.curvature(), pattern).matrix)
        result[rows] = transform(golden.delta[rows])
    return result


def test_there_are_six_cases():
    assert len(CASES) == 6


def test_fully_kept_columns_are_those_of_the_published_code(golden):
    rule = golden.rule(compensation="sequential")
    transform = rule.transform(
        rule.prepare(LayerMoments(safety=golden.hessian())),
        MatrixDelta(golden.delta, Role.LINEAR.view(golden.delta.shape)),
    )
    assert torch.equal(transform.kept, golden.kept.all(0))


def test_sequential_compensation_reproduces_the_published_weights(golden):
    ours = by_kept_pattern(golden, sequential_response)
    assert (ours - golden.adjusted).norm() <= 1e-4 * golden.adjusted.norm()


@pytest.mark.parametrize("name", [case for case in CASES if case != "two_blocks_16x2304"])
def test_published_weights_match_the_float64_sweep(name):
    golden = Golden(name)
    slow = oracles.published_sweep(
        golden.delta, golden.kept, oracles.damped(golden.hessian(), golden.settings["damping"])
    )
    assert (slow - golden.adjusted).norm() <= 1e-4 * golden.adjusted.norm()


@pytest.mark.parametrize("name", [case for case in CASES if case != "two_blocks_16x2304"])
def test_entry_selection_keeps_the_published_columns_and_cuts_at_most_one(name):
    golden = Golden(name)
    pivots = golden.curvature().pivots
    kept = select_entries(pivots, golden.delta, budget(pivots, golden.settings["strength"], len(golden.delta)), 0.15)
    assert torch.equal(kept.all(0), golden.kept.all(0))
    assert (kept.any(0) & ~kept.all(0)).sum() <= 1


def test_joint_compensation_never_leaves_more_loss_than_sequential(golden):
    hessian = golden.curvature().hessian
    joint = oracles.loss(by_kept_pattern(golden, joint_response), hessian)
    sequential = oracles.loss(by_kept_pattern(golden, sequential_response), hessian)
    assert joint <= sequential * (1 + 1e-5)
