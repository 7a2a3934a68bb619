"""Rounding with the errors fed on: what it gives, and what it saves."""

import pytest
import torch

from safedelta_hf.core.curvature import factorise
from safedelta_hf.core.rounding import CHUNK, is_coarse, round_columns
from tests.fixtures import oracles

COARSE = [torch.bfloat16, torch.float16]


def column_by_column(weight, dtype, hessian):
    """Oracle: each column is rounded after what the best response to all earlier errors adds to it."""
    weight, hessian = weight.double(), hessian.double()
    rounded = torch.zeros_like(weight)
    for k in range(weight.shape[1]):
        wanted = weight[:, k].clone()
        if k:
            errors = weight[:, :k] - rounded[:, :k]
            # Of all later columns the best response, and of that the part that falls on this one.
            wanted += (errors @ hessian[:k, k:] @ torch.linalg.inv(hessian[k:, k:]))[:, 0]
        rounded[:, k] = wanted.float().to(dtype).double()
    return rounded


def problem(rows, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / torch.arange(1, size + 1)[:, None]
    inputs = torch.randn(3 * size, size, generator=generator) @ mixing  # a few directions are large, as in models
    return torch.randn(rows, size, generator=generator), inputs.T @ inputs / size


@pytest.mark.parametrize("dtype", COARSE)
def test_each_column_answers_the_errors_of_those_before_it(dtype):
    weight, hessian = problem(6, 9)
    curvature = factorise(hessian, 0.1)
    found = round_columns(weight, dtype, curvature.factor)
    assert found.dtype == dtype and found.shape == weight.shape
    expected = column_by_column(weight, dtype, oracles.damped(hessian, 0.1))
    # One entry in a thousand may fall on the other side of a tie in float32.
    assert (found.double() != expected).sum() <= 1


@pytest.mark.parametrize("dtype", COARSE)
def test_the_error_that_counts_is_less_than_half_a_step_of_each_column(dtype):
    weight, hessian = problem(5, 2 * CHUNK + 7)
    curvature = factorise(hessian, 0.1)
    found = round_columns(weight, dtype, curvature.factor)
    mixed = (weight.double() - found.double()) @ curvature.factor.double() / curvature.factor.diagonal()
    step = torch.finfo(dtype).eps * 2.0 ** found.double().abs().log2().floor().nan_to_num(neginf=-14)
    assert (mixed.abs() <= 0.51 * step + 1e-5).all()


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("share", [1e-3, 1e-2])
def test_it_costs_less_safety_than_rounding_to_the_nearest(dtype, share):
    base, hessian = problem(64, 48)
    wanted = base.to(dtype).float() + share * torch.randn(base.shape)
    curvature = factorise(hessian, 0.1)
    fed, nearest = round_columns(wanted, dtype, curvature.factor), wanted.to(dtype)
    losses = [oracles.loss(rounded.float() - wanted, hessian) for rounded in (fed, nearest)]
    assert losses[0] < losses[1] / 2


@pytest.mark.parametrize("dtype", COARSE)
def test_what_the_type_holds_and_what_nothing_can_answer_are_rounded_to_the_nearest(dtype):
    weight, hessian = problem(7, 20)
    held = weight.to(dtype)
    assert torch.equal(round_columns(held.float(), dtype, factorise(hessian, 0.1).factor), held)
    assert torch.equal(round_columns(weight, dtype, torch.eye(20)), held)


def test_only_types_coarser_than_float32_need_it():
    assert [is_coarse(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)] == [
        True,
        True,
        False,
        False,
    ]
