"""What is solved with a factor is what the matrix gives, in float64."""

import pytest
import torch

from safedelta_hf.core.curvature import quadratic_loss
from safedelta_hf.core.low_rank import LowRank, LowRankShrinkage, dense, gram, pays, solves_sooner, total_of
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.core.null_space import null_space
from safedelta_hf.core.ridge import shrinkage, utility_of
from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.dense import DenseMatrix
from safedelta_hf.records.uses import Role

SIZE = 24
STRENGTHS = [1e-6, 1e-3, 1.0, 1e3, 1e6]


def factor(rank, size=SIZE, seed=0):
    """Inputs of very different sizes, of which some are equal, and some features are never active."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(rank, size, generator=generator) * torch.logspace(1, -2, size)
    rows[rank // 2 :] = rows[: rank - rank // 2].clone()
    rows[:, 3] = 0
    return rows


def low_rank(rank=6, *, rest=False, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    return LowRank(factor=factor(rank, seed=seed), rest=torch.rand(SIZE, generator=generator) if rest else None)


def exact(matrix):
    found = matrix.factor.double().T @ matrix.factor.double()
    return found if matrix.rest is None else found + matrix.rest.double().diag()


def delta(rows=5):
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("rank", [1, 6, SIZE])
def test_it_is_the_matrix_in_all_that_it_can_be_asked(rank, rest):
    matrix, rows = low_rank(rank, rest=rest), delta()
    whole = exact(matrix)
    close = {"rtol": 1e-5, "atol": 1e-5 * float(whole.abs().max())}
    torch.testing.assert_close(matrix.dense().double(), whole, **close)
    torch.testing.assert_close(matrix.diagonal().double(), whole.diagonal(), **close)
    torch.testing.assert_close(matrix(rows).double(), rows.double() @ whole, **close)
    form = (rows.double() * (rows.double() @ whole)).sum()
    assert float(matrix.form(rows)) == pytest.approx(float(form), rel=1e-5)
    assert float(matrix.form(rows.double())) == pytest.approx(float(form), rel=1e-12)
    torch.testing.assert_close((matrix * 0.3).dense().double(), 0.3 * whole, **close)
    torch.testing.assert_close(matrix.raised(torch.tensor(2.0)).dense().double(), whole + 2 * torch.eye(SIZE), **close)
    assert tuple(matrix.shape) == (SIZE, SIZE) and len(matrix) == SIZE and matrix.any() and matrix.rank == rank
    assert not (matrix * 0.0).any() and matrix.nbytes == 4 * SIZE * (rank + rest)


def test_a_sum_is_of_low_rank_while_that_pays_and_else_the_matrix():
    few, many = [low_rank(4, seed=0), low_rank(5, rest=True, seed=5)], low_rank(10)
    found = total_of(few)
    assert isinstance(found, LowRank) and found.rank == 9
    torch.testing.assert_close(found.dense().double(), exact(few[0]) + exact(few[1]), rtol=1e-5, atol=1e-3)
    for parts in ([*few, many], [few[0], dense(many)], [dense(few[0]), many]):
        whole = sum(part.double() if isinstance(part, torch.Tensor) else exact(part) for part in parts)
        found = total_of(parts)
        assert isinstance(found, torch.Tensor)
        torch.testing.assert_close(found.double(), whole, rtol=1e-5, atol=1e-3)
    assert pays(1, 2) and pays(12, 24) and not pays(13, 24) and not pays(1, 1)
    assert solves_sooner(18, 24) and not solves_sooner(19, 24)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("rank", [1, 6, 12, 18])
def test_ridge_of_a_factor_is_the_closed_form_at_any_strength(rank, rest, strength):
    matrix, rows = low_rank(rank, rest=rest), delta()
    transform = shrinkage(matrix, None, strength)
    assert isinstance(transform, LowRankShrinkage)
    whole = torch.eye(SIZE, dtype=torch.float64) + strength * exact(matrix)
    expected = torch.linalg.solve(whole, rows.double().T).T
    assert (transform(rows).double() - expected).norm() <= 1e-5 * rows.norm()


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("ranks", [(1, 1), (6, 6), (2, 10), (9, 9)])
def test_task_ridge_of_two_factors_is_the_closed_form_at_any_strength(ranks, strength):
    matrix, rows = low_rank(ranks[0]), delta()
    utility = utility_of(low_rank(ranks[1], seed=3), 0.1)
    transform = shrinkage(matrix, utility, strength)
    assert isinstance(transform, LowRankShrinkage)
    useful = rows.double() @ exact(utility)
    expected = torch.linalg.solve(exact(utility) + strength * exact(matrix), useful.T).T
    assert (transform(rows).double() - expected).norm() <= 1e-4 * rows.norm()


def test_strength_zero_keeps_the_delta_and_where_rank_does_not_pay_the_matrix_is_solved():
    rows = delta()
    assert torch.equal(shrinkage(low_rank(), None, 0.0)(rows), rows)
    found = shrinkage(low_rank(SIZE), None, 2.0)
    assert not isinstance(found, LowRankShrinkage)
    expected = torch.linalg.solve(torch.eye(SIZE).double() + 2 * exact(low_rank(SIZE)), rows.double().T).T
    torch.testing.assert_close(found(rows).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_task_that_is_a_matrix_is_solved_as_one():
    task = torch.eye(SIZE)
    found = shrinkage(low_rank(), task, 2.0)(delta())
    torch.testing.assert_close(found, shrinkage(low_rank().dense(), task, 2.0)(delta()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("energy", [0.0, 0.05, 0.5, 1.0])
def test_the_null_space_of_a_factor_is_that_of_the_matrix(energy):
    rows, matrix = delta(), low_rank()
    found, expected = null_space(matrix, energy)(rows), null_space(matrix.dense(), energy)(rows)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_quadratic_loss_is_that_of_the_matrix():
    view = DenseMatrix(delta(), Role.LINEAR.view((5, SIZE)))
    found, expected = (
        quadratic_loss(view.inner, matrix) for matrix in (low_rank(rest=True), low_rank(rest=True).dense())
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_hessian_and_union_of_moments_stay_of_low_rank():
    one, other = (InputMoment(total=low_rank(4, seed=seed), sequences=4, tokens=4) for seed in (0, 1))
    hessian = one.hessian(torch.device("cpu"))
    assert isinstance(hessian, LowRank)
    torch.testing.assert_close(hessian.dense(), one.total.dense() / 2)
    assert isinstance(one.merge(other).total, LowRank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_lower_half_of_a_gram_matrix_is_formed(dtype, monkeypatch):
    monkeypatch.setattr("safedelta_hf.core.low_rank.BLOCK", 4)
    wide, inverse = factor(10), torch.rand(SIZE)
    found = gram(wide, inverse, dtype)
    expected = torch.eye(10).double() + (wide.double() * inverse.double()) @ wide.double().T
    torch.testing.assert_close(found.double().tril(), expected.tril(), rtol=1e-5, atol=1e-3)
    assert not found[:4, 4:].any() and found.dtype == dtype


def test_what_a_factor_leaves_alone_is_kept_exactly_as_it_was():
    assert isinstance(shrinkage(low_rank(), None, 0.0), Dense)
    rows = torch.zeros(2, SIZE)
    rows[:, 3] = 5.0  # a feature that is never active
    assert torch.equal(shrinkage(low_rank(), None, 10.0)(rows), rows)
