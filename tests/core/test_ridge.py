import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from safedelta_hf.core.curvature import loss_by_price
from safedelta_hf.core.ridge import Shrinkage, semidefinite_root, shrinkage, utility_of
from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.dense import DenseDelta
from safedelta_hf.errors import FactorisationError, NumericalError
from tests.fixtures import oracles
from tests.fixtures.problems import layer, layers

strengths = st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e4])


def task_moment(delta, seed=7):
    return layer(seed, 1, delta.shape[1], 40)[1]


def rounding(utility, hessian, strength):
    """What float32 can promise of a solution: some multiples of its precision times the condition number."""
    return 1e-5 + 10 * torch.finfo(torch.float32).eps * float(
        torch.linalg.cond((utility + strength * hessian).double())
    )


def objective(candidate, delta, utility, hessian, strength):
    """What task ridge minimises, in float64."""
    moved, candidate = (candidate - delta).double(), candidate.double()
    task = torch.trace(moved @ utility.double() @ moved.T)
    return float(task + strength * torch.trace(candidate @ hessian.double() @ candidate.T))


@given(layers, strengths)
def test_ridge_is_the_closed_form(problem, strength):
    delta, hessian = problem
    found = shrinkage(hessian, None, strength)(delta)
    expected = oracles.ridge(delta, torch.eye(len(hessian)), hessian, strength)
    assert (found - expected).norm() <= rounding(torch.eye(len(hessian)), hessian, strength) * delta.norm()


@given(layers, strengths)
def test_task_ridge_is_the_closed_form(problem, strength):
    delta, hessian = problem
    utility = utility_of(task_moment(delta), 0.1)
    found = shrinkage(hessian, utility, strength)(delta)
    expected = oracles.ridge(delta, utility, hessian, strength)
    assert (found - expected).norm() <= rounding(utility, hessian, strength) * delta.norm()


def kept_and_carried(delta, hessian, strength, dtype=torch.float32, base=0.0):
    transform = shrinkage(hessian, None, strength)
    whole = DenseDelta(delta, torch.zeros_like(delta))
    kept = whole.keeping(transform(delta))
    weight = (torch.full_like(delta, base) + kept.values).to(dtype).float() - base
    return transform.price, kept, whole.keeping(weight)


@given(layers, strengths)
def test_what_is_lost_tells_the_loss_of_what_weights_carry_or_nothing(problem, strength):
    delta, hessian = problem
    price, kept, carried = kept_and_carried(delta, hessian, strength, base=10.0)
    found = None if price is None else loss_by_price(kept.lost(carried), price, hessian)
    if found is not None:
        assert found == pytest.approx(oracles.loss(carried.values, hessian), rel=3e-5)


def test_what_is_lost_tells_no_loss_that_rounding_has_a_say_in():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 64, generator=generator)
    delta, hessian = torch.randn(32, 64, generator=generator), inputs.T @ inputs / 100
    for strength, dtype, tells in (
        (1.0, torch.float32, True),
        (1e-4, torch.float32, False),  # hardly anything is lost
        (1.0, torch.bfloat16, False),  # rounding moves the weights by too much
    ):
        price, kept, carried = kept_and_carried(delta, hessian, strength, dtype)
        found = loss_by_price(kept.lost(carried), price, hessian)
        assert (found is not None) == tells
    inputs[:, 0] = inputs[:, 1] + 1e-2 * inputs[:, 0]  # two inputs that are nearly one
    assert shrinkage(inputs.T @ inputs / 100, None, 1e3).price is None
    assert shrinkage(hessian, hessian, 1.0).price is None
    price, kept, carried = kept_and_carried(delta * 1e-25, hessian, 1.0)
    assert loss_by_price(kept.lost(carried), price, hessian) is None  # squares vanish


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_no_other_adjustment_has_a_lower_objective(strength):
    delta, hessian = layer(3, 4, 6, 20)
    utility = utility_of(task_moment(delta), 0.1)
    found = shrinkage(hessian, utility, strength)(delta)
    candidate = torch.zeros_like(delta, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([candidate], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        moved = candidate - delta.double()
        value = torch.trace(moved @ utility.double() @ moved.T)
        value = value + strength * torch.trace(candidate @ hessian.double() @ candidate.T)
        value.backward()
        return value

    optimiser.step(closure)
    best = objective(candidate.detach(), delta, utility, hessian, strength)
    assert objective(found, delta, utility, hessian, strength) <= best * (1 + 1e-5)
    torch.testing.assert_close(found.double(), candidate.detach(), rtol=1e-3, atol=1e-4)


@given(layers, strengths)
def test_a_diagonal_is_the_matrix_with_that_diagonal(problem, strength):
    delta, hessian = problem
    diagonal, task = hessian.diagonal().clone(), task_moment(delta).diagonal().clone()
    whole = shrinkage(diagonal.diag(), utility_of(task.diag(), 0.1), strength)(delta)
    torch.testing.assert_close(
        shrinkage(diagonal, utility_of(task, 0.1), strength)(delta), whole, rtol=1e-3, atol=1e-3 * float(delta.norm())
    )


@given(layers)
def test_zero_strength_keeps_the_delta_bit_for_bit(problem):
    delta, hessian = problem
    assert torch.equal(shrinkage(hessian, utility_of(task_moment(delta), 0.1), 0.0)(delta), delta)


@given(st.integers(0, 1000))
def test_a_huge_strength_drops_what_the_safety_data_uses(seed):
    delta, hessian = layer(seed, 5, 8, 60)
    hessian += torch.eye(8)
    assert shrinkage(hessian, None, 1e9)(delta).norm() <= 1e-6 * delta.norm()


@given(layers)
def test_the_quadratic_loss_falls_and_the_distance_rises_with_the_strength(problem):
    delta, hessian = problem
    kept = [shrinkage(hessian, None, strength)(delta) for strength in (0.0, 0.01, 0.3, 10.0, 1e3)]
    losses = [oracles.loss(one, hessian) for one in kept]
    moved = [float((one - delta).norm()) for one in kept]
    slack = 1e-4 * losses[0] + 1e-6
    assert all(after <= before + slack for before, after in zip(losses, losses[1:], strict=False))
    assert all(after >= before - 1e-4 * float(delta.norm()) for before, after in zip(moved, moved[1:], strict=False))


def test_inputs_that_the_safety_data_never_used_keep_their_delta():
    delta, hessian = layer(5, 4, 8, 30)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    found = shrinkage(hessian, None, 100.0)(delta)
    torch.testing.assert_close(found[:, 3], delta[:, 3])


def test_massive_inputs_do_not_spoil_the_others():
    delta, hessian = layer(11, 16, 64, 400)
    scale = torch.ones(64)
    scale[5] = 1e3  # as the massive activations of language models
    hessian = scale[:, None] * hessian * scale
    task = scale[:, None] * task_moment(delta) * scale
    utility = utility_of(task, 0.1)
    for strength in (0.1, 10.0, 1e3):
        expected = oracles.ridge(delta, utility, hessian, strength)
        found = shrinkage(hessian, utility, strength)(delta)
        assert (found - expected).norm() <= 2e-2 * expected.norm()
        assert objective(found, delta, utility, hessian, strength) <= 1.01 * objective(
            expected, delta, utility, hessian, strength
        )


def test_nan_is_an_error():
    hessian = torch.eye(3)
    hessian[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        shrinkage(hessian, None, 1.0)


def apart(found, expected):
    """Relative distance in float64."""
    return float((found.double() - expected).norm() / expected.norm())


def unused_part(rows, inputs):
    """What of some rows lies in the directions that no input has, float64."""
    used = torch.linalg.qr(inputs.T).Q
    return rows.double() - rows.double() @ used @ used.T


def in_exact_arithmetic(delta, inputs, utility, strength):
    """Ridge from the inputs themselves in float64, in a form that no strength makes singular."""
    scaled = (2 / 4) ** 0.5 * inputs
    weighed = torch.linalg.solve(utility, scaled.T)
    inner = scaled @ weighed + torch.eye(len(inputs), dtype=torch.float64) / strength
    return delta.double() - delta.double() @ scaled.T @ torch.linalg.solve(inner, weighed.T)


def fewer_tokens_than_inputs(collinear, tokens=60, size=96):
    """Inputs, float64, two of them massive: at all tokens, or at the same few tokens as in language models."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    if collinear:
        inputs[::20, 7] += 1000.0
        inputs[::20, 31] -= 700.0
    else:
        inputs[:, [7, 31]] *= torch.tensor([1000.0, 700.0], dtype=torch.float64)
    return inputs


@pytest.mark.parametrize("size", [8, 64, 300])
@pytest.mark.parametrize(("strength", "scale"), [(1e6, 1.0), (1.0, 1e6), (1e6, 1e6)])
def test_directions_that_one_safety_token_does_not_use_keep_their_delta(size, strength, scale):
    generator = torch.Generator().manual_seed(size)
    token = scale**0.5 * torch.randn(1, size, generator=generator, dtype=torch.float64)
    delta = torch.randn(4, size, generator=generator)
    found = shrinkage((token.T @ token).float(), None, strength)(delta)
    assert apart(unused_part(found, token), unused_part(delta, token)) <= 1e-5
    assert (found.double() @ token.T).norm() <= 1e-5 * (delta.double() @ token.T).norm()


@pytest.mark.parametrize("collinear", [False, True])
@pytest.mark.parametrize("strength", [1e-5, 1.0, 10.0, 1e3, 1e6, 1e12])
def test_fewer_tokens_than_inputs_end_no_range_of_strengths(strength, collinear):
    inputs = fewer_tokens_than_inputs(collinear)
    hessian = (2 / 4 * inputs.T @ inputs).float()
    delta = torch.randn(5, len(hessian), generator=torch.Generator().manual_seed(1))
    task = task_moment(delta)
    blended = task.double() + 0.1 * task.double().diagonal().mean() * torch.eye(len(task), dtype=torch.float64)
    for utility, exact in ((None, torch.eye(len(task), dtype=torch.float64)), (utility_of(task, 0.1), blended)):
        expected = in_exact_arithmetic(delta, inputs, exact, strength)
        found = shrinkage(hessian, utility, strength)(delta)
        assert apart(found, expected) <= 1e-2
        assert apart(unused_part(found, inputs), unused_part(expected, inputs)) <= 1e-2


@given(layers, st.sampled_from([1e-3, 1.0, 1e3, 1e6, 1e12]))
def test_no_strength_is_off_by_more_than_a_hundredth(problem, strength):
    delta, hessian = problem
    values, vectors = torch.linalg.eigh(hessian.double())
    # What is less than rounding of the largest is rounding: of two tokens, size - 2 directions are unused.
    values = torch.where(values > 1e-5 * values[-1], values, 0.0)
    exact = (vectors * values) @ vectors.T
    near = torch.linalg.eigvalsh(hessian.double()) / values[-1]
    assume(not ((near.abs() > 1e-7) & (near < 1e-3)).any())  # there rounding decides whether a direction is used
    expected = oracles.ridge(delta, torch.eye(len(hessian)), exact, strength)
    assert (shrinkage(hessian, None, strength)(delta) - expected).norm() <= 1e-2 * delta.norm()


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e4, 1e9])
def test_a_well_conditioned_system_is_solved_in_float32_whatever_the_strength(strength):
    inputs = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    inputs[:, 3] *= 1e3
    transform = shrinkage(inputs.T @ inputs, None, strength)
    assert isinstance(transform, Shrinkage) and transform.factor.dtype == torch.float32 and not transform.notes


def test_what_float32_cannot_solve_is_said():
    inputs = fewer_tokens_than_inputs(collinear=True)
    transform = shrinkage((inputs.T @ inputs).float(), None, 1e4)
    assert isinstance(transform, Dense)
    assert transform.notes == ("solved in float64; float32 tells 60 of 96 directions of the safety data from rounding",)


@given(layers)
def test_the_root_gives_the_moment_back_but_for_rounding(problem):
    _, hessian = problem
    root = semidefinite_root(hessian)
    size = hessian.diagonal().double().sqrt()
    rounding = 4 * len(hessian) * torch.finfo(torch.float32).eps
    assert ((root @ root.T - hessian).abs() <= rounding * size * size[:, None] + 1e-30).all()


def test_a_moment_without_rounding_has_as_many_directions_as_its_rank():
    vectors = torch.randint(-4, 5, (70, 200), generator=torch.Generator().manual_seed(0)).float()
    assert semidefinite_root(vectors.T @ vectors).shape == (200, 70)


@pytest.mark.parametrize("strength", [1e30, 1e39, 1e300])
def test_no_strength_is_too_large_for_what_safety_never_used(strength):
    hessian = torch.tensor([0.0, 1.0, 1e9])
    for moment in (hessian, hessian.diag()):
        for utility in (None, utility_of(torch.ones_like(moment) if moment.ndim == 1 else torch.eye(3), 0.1)):
            found = shrinkage(moment, utility, strength)(torch.ones(2, 3))
            torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0]] * 2))


def test_a_task_moment_that_is_no_utility_is_a_named_error():
    task = torch.tensor([[1.0, 1.1], [1.1, 1.0]])
    with pytest.raises(FactorisationError, match="raise blend"):
        shrinkage(torch.ones(2, 2), task, 1.0)
