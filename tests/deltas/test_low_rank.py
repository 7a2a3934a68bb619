"""A product of factors is adjusted as the matrix that it is, and the matrix is never formed."""

import pytest
import torch

from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.low_rank import FactoredDelta, StackedDelta, distance, energy
from safedelta_hf.errors import AdapterError
from safedelta_hf.records.uses import MatrixView
from tests.fixtures import by_hand

SCALING = 1.5


def product(left, right, scaling=SCALING):
    """Oracle: the delta written out in float64."""
    return scaling * left.double() @ right.double()


def factors(first=5, second=4, rank=2, dtype=torch.float32):
    return torch.randn(first, rank).to(dtype), torch.randn(rank, second).to(dtype)


def use_of(transposed, first=5, second=4, start=0):
    view = MatrixView.contiguous(first, second, start)
    return by_hand.use_of("w", (first, second), view=view.transposed if transposed else view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_use_sees_and_a_transform_changes_is_the_product(transposed, dtype):
    left, right = factors(dtype=dtype)
    delta, use = FactoredDelta(left, right, SCALING), use_of(transposed)
    seen = product(left, right).T if transposed else product(left, right)
    transform = Dense(matrix=torch.randn(seen.shape[1], seen.shape[1]))
    expected = seen @ transform.matrix.double()
    matrix = delta.matrix(use)
    assert matrix.rows == len(seen)
    torch.testing.assert_close(matrix.column_energy().double(), seen.square().sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(matrix.column_energy(transform).double(), expected.square().sum(0), rtol=1e-4, atol=1e-5)
    assert matrix.inner(transform) == pytest.approx(float((seen * expected).sum()), rel=1e-4, abs=1e-5)
    changed = delta.transformed(use, transform)
    stored = expected.T if transposed else expected
    torch.testing.assert_close(changed.values.double(), stored, rtol=1e-4, atol=1e-5)
    lost = product(left, right) - stored
    assert changed.lost_energy == pytest.approx(float(lost.square().sum()), rel=1e-4, abs=1e-5)
    assert changed.tuned_energy == delta.tuned_energy == pytest.approx(float(seen.square().sum()), rel=1e-6)
    # The factors that face the outputs are as tuned.
    same = 1 if transposed else 0
    assert torch.equal(changed.factors[same], (left, right)[same].float())


def test_the_tuned_delta_is_never_changed_and_nothing_kept_is_zero():
    left, right = factors()
    delta = FactoredDelta(left, right, SCALING)
    dropped = delta.zero()
    twice = delta.transformed(use_of(False), Dense(matrix=torch.zeros(4))).transformed(
        use_of(True), Dense(matrix=torch.ones(5))
    )
    for none in (dropped, twice):
        assert not none.values.any() and none.lost_energy == pytest.approx(none.tuned_energy)
    assert delta.lost_energy == 0
    assert torch.equal(delta.factors[0], left) and torch.equal(delta.factors[1], right)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_energy_and_distance_are_those_of_the_products(rank):
    one, other = factors(rank=rank), factors(rank=2)
    expected = product(*one)
    assert energy(*one, SCALING) == pytest.approx(float(expected.square().sum()))
    assert distance(one, other, SCALING) == pytest.approx(float((expected - product(*other)).square().sum()))
    assert distance(one, one, SCALING) == pytest.approx(0, abs=1e-9 * energy(*one, SCALING))


def test_a_part_of_a_product_is_refused():
    delta = FactoredDelta(*factors(), SCALING)
    rows = by_hand.use_of("w", (5, 4), view=MatrixView.contiguous(3, 4))
    for act in (delta.matrix, lambda use: delta.transformed(use, Dense(matrix=torch.ones(4)))):
        with pytest.raises(AdapterError, match=r"uses a part \[3, 4\] of the \[5, 4\]"):
            act(rows)


def stack(count=3):
    pairs = [factors() for _ in range(count)]
    return pairs, StackedDelta([FactoredDelta(*pair, SCALING) for pair in pairs], 20)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("number", [0, 2])
def test_one_matrix_of_a_stack_is_changed_and_no_other(number, transposed):
    pairs, delta = stack()
    use = use_of(transposed, start=20 * number)
    transform = Dense(matrix=torch.randn(use.view.columns, use.view.columns))
    changed = delta.transformed(use, transform)
    alone = FactoredDelta(*pairs[number], SCALING).transformed(use_of(transposed), transform)
    for place, (one, pair) in enumerate(zip(changed.products, pairs, strict=True)):
        expected = alone.values if place == number else FactoredDelta(*pair, SCALING).values
        assert torch.equal(one.values, expected)
    assert changed.lost_energy == pytest.approx(alone.lost_energy)
    assert changed.tuned_energy == pytest.approx(sum(energy(*pair, SCALING) for pair in pairs))
    assert delta.lost_energy == 0 and not any(one.values.any() for one in delta.zero().products)
    assert torch.equal(delta.matrix(use).column_energy(), delta.products[number].matrix(use).column_energy())


@pytest.mark.parametrize(
    "view", [MatrixView.contiguous(5, 4, 7), MatrixView.contiguous(10, 4), MatrixView.contiguous(6, 5, 20)]
)
def test_what_is_no_matrix_of_the_stack_is_refused(view):
    _, delta = stack()
    with pytest.raises(AdapterError, match="does not use it matrix by matrix"):
        delta.matrix(by_hand.use_of("w", (3, 5, 4), view=view))
