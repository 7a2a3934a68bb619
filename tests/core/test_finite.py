import pytest
import torch

from safedelta_hf.core.finite import is_finite

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 998, 999])
def test_one_entry_that_is_not_finite_is_found_wherever_it_stands(dtype, spoilt, place):
    tensor = torch.ones(10, 100, dtype=dtype)
    tensor.view(-1)[place] = spoilt
    assert not is_finite(tensor) and not is_finite(tensor.T)


@pytest.mark.parametrize("dtype", TYPES)
def test_finite_entries_whose_sum_is_not_are_finite(dtype):
    largest = torch.full((100, 100), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest) and is_finite(-largest) and is_finite(largest[:0])


def test_infinities_of_both_signs_hide_nothing():
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
