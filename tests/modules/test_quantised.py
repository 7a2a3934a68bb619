"""Packed weights are recognised whoever packed them, and told from others by what they store."""

import pytest
import torch
from torch import nn

from safedelta_hf.modules.quantised import is_quantised, stored_tensors
from safedelta_hf.weights.digest import digest


class Packed(torch.Tensor):
    """As torchao's: a tensor subclass that names the plain tensors inside it."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(f"its entries were read: {func}")


def packed(code=1, scale=0.5):
    return Packed(torch.full((4, 3), code, dtype=torch.int8), torch.full((4,), float(scale)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_plain_weight_is_not_quantised_and_stores_itself(dtype):
    weight = nn.Parameter(torch.zeros(4, 3).to(dtype), requires_grad=False)
    assert not is_quantised(weight)
    assert stored_tensors(weight)[0] is weight and len(stored_tensors(weight)) == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_of_integers_are_quantised_and_are_what_is_stored(dtype):
    weight = nn.Parameter(torch.ones(12, 1, dtype=dtype), requires_grad=False)
    assert is_quantised(weight)
    assert stored_tensors(weight)[0] is weight and len(stored_tensors(weight)) == 1


def test_a_subclass_stores_its_plain_tensors_in_the_order_it_names_them_however_deep():
    weight = packed()
    nested = Packed(packed(code=3, scale=2.0), torch.ones(4))
    assert is_quantised(weight) and is_quantised(nested)
    codes, scales = stored_tensors(weight)
    assert codes is weight.codes and scales is weight.scales
    assert [id(tensor) for tensor in stored_tensors(nested)] == [
        id(tensor) for tensor in (nested.codes.codes, nested.codes.scales, nested.scales)
    ]


def test_codes_and_scales_both_tell_a_packed_weight_from_others():
    assert digest(packed()) == digest(packed())
    assert len({digest(packed()), digest(packed(code=2)), digest(packed(scale=0.25))}) == 3


def test_bitsandbytes_codes_are_the_same_before_and_after_a_forward_pass_reorders_them():
    functional = pytest.importorskip("bitsandbytes.functional")
    if not hasattr(functional, "_convert_weight_packed_for_cpu"):
        pytest.skip("this bitsandbytes does not reorder codes")
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 64, bias=False).state_dict())
    layer = layer.to("cpu")
    assert is_quantised(layer.weight)
    (before,) = (tensor.clone() for tensor in stored_tensors(layer.weight))
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this processor computes with the codes in their order")
    (after,) = stored_tensors(layer.weight)
    assert torch.equal(before.flatten(), after.flatten())
