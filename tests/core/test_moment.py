import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.moment import PANEL, InputMoment, add_outer_, fill_lower_


def moment(inputs, sequences=1):
    total = torch.zeros(inputs.shape[1], inputs.shape[1])
    add_outer_(total, inputs)
    fill_lower_(total)
    return InputMoment(total=total, sequences=sequences, tokens=len(inputs))


@given(st.integers(1, 40), st.integers(0, 40))
def test_moments_of_parts_add_up_to_the_moment_of_the_whole(first, second):
    inputs = torch.randn(first + second, 5)
    merged = moment(inputs[:first], 2).merge(moment(inputs[first:], 3))
    torch.testing.assert_close(merged.total, moment(inputs).total, rtol=1e-4, atol=1e-4)
    assert (merged.sequences, merged.tokens) == (5, first + second)


@pytest.mark.parametrize("size", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_a_moment_is_summed_by_its_upper_half_and_whole_in_the_end(size):
    inputs = torch.randn(2, 9, size)
    total = torch.zeros(size, size)
    for part in inputs:
        add_outer_(total, part)
    assert not total[PANEL:, :PANEL].any()
    fill_lower_(total)
    exact = inputs.flatten(0, 1).double()
    torch.testing.assert_close(total.double(), exact.T @ exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(total.triu(PANEL), total.tril(-PANEL).T)


def test_hessian_is_two_over_n_times_the_moment():
    inputs = torch.randn(30, 4)
    hessian = moment(inputs, 6).hessian(torch.device("cpu"))
    torch.testing.assert_close(hessian.double(), 2 / 6 * inputs.double().T @ inputs.double(), rtol=1e-5, atol=1e-5)


def test_bfloat16_inputs_are_summed_in_float32():
    inputs = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    assert moment(inputs).total.item() == 4096.0


def test_moments_are_float32_under_autocast_wherever_they_live():
    inputs = torch.randn(64, 8) + 20
    expected = inputs.double().T @ inputs.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = torch.zeros(8, 8)
        add_outer_(total, inputs)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-3)
