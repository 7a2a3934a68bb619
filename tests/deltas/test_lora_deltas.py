"""Each form of an adapter gives the delta that its tensors mean, and takes it back bit for bit."""

import pytest
import torch

from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.lora_deltas import (
    BiasDelta,
    ExpertsDelta,
    FullDelta,
    LowRankDelta,
    TokenRowsDelta,
    low_rank_shape,
)
from safedelta_hf.records.uses import MatrixView, Role
from tests.fixtures import by_hand

SCALING = 1.5
EXPERTS, FIRST, SECOND, RANK = 3, 4, 5, 2


def low_rank(transposed, dtype=torch.float32, kernel=()):
    down, up = torch.randn(RANK, 5, *kernel).to(dtype), torch.randn(4, RANK, *[1] * len(kernel)).to(dtype)
    shape = low_rank_shape(down, up, transposed=transposed)
    tensors = {"A": down, "B": up}
    return LowRankDelta(parameter="w", shape=shape, tensors=tensors, scaling=SCALING, transposed=transposed)


def experts(transposed, dtype=torch.float32):
    inside, outside = (FIRST, SECOND) if transposed else (SECOND, FIRST)
    tensors = {
        "A": torch.randn(EXPERTS * RANK, inside).to(dtype),
        "B": torch.randn(outside, RANK * EXPERTS).to(dtype),
    }
    shape = (EXPERTS, FIRST, SECOND)
    return ExpertsDelta(parameter="w", shape=shape, tensors=tensors, scaling=SCALING, transposed=transposed)


def full():
    return FullDelta(parameter="w", shape=(4, 3), tensors={"w": torch.randn(4, 3)}, base=torch.randn(4, 3))


def bias(scaling=0.5):
    return BiasDelta(parameter="b", shape=(4,), tensors={"b": torch.randn(4)}, scaling=scaling)


def token_rows(dtype=torch.float32):
    base = torch.randn(6, 3).to(dtype)
    tensors = {"rows": torch.randn(2, 3).to(dtype)}
    return TokenRowsDelta(parameter="e", shape=(6, 3), tensors=tensors, indices=torch.tensor([4, 1]), base=base)


ROUND_TRIPS = {
    "full": full,
    "bias": bias,
    "token rows": token_rows,
    "low rank": lambda: low_rank(False),
    "low rank, inputs first": lambda: low_rank(True),
    "convolution": lambda: low_rank(False, kernel=(3, 2)),
    "experts": lambda: experts(False),
    "experts, inputs first": lambda: experts(True),
    "low rank in bfloat16": lambda: low_rank(False, torch.bfloat16),
    "experts in float16": lambda: experts(True, torch.float16),
}


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_the_unadjusted_delta_gives_the_tensors_back_bit_for_bit(kind):
    tuned = ROUND_TRIPS[kind]()
    adjusted = tuned.adjusted(tuned.delta())
    assert adjusted.notes == ()
    assert adjusted.tensors.keys() == tuned.tensors.keys()
    for name, tensor in tuned.tensors.items():
        found = adjusted.tensors[name]
        assert found.shape == tensor.shape and found.dtype == tensor.dtype and torch.equal(found, tensor)


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_what_is_zeroed_reads_as_no_delta(kind):
    tuned = ROUND_TRIPS[kind]()
    zeroed = replaced(tuned, tuned.adjusted(tuned.delta().zero()).tensors)
    assert zeroed.delta().tuned_energy == 0 < tuned.delta().tuned_energy


def replaced(tuned, tensors):
    """The same adapter with other tensors."""
    own = {name: getattr(tuned, name) for name in tuned.__dataclass_fields__}
    return type(tuned)(**own | {"tensors": tensors})


@pytest.mark.parametrize(("transposed", "kernel"), [(False, ()), (True, ()), (False, (3, 2))])
def test_a_pair_means_its_product(transposed, kernel):
    tuned = low_rank(transposed, kernel=kernel)
    down, up = (tensor.flatten(1).double() for tensor in tuned.tensors.values())
    expected = SCALING * up @ down
    expected = expected.T if transposed else expected
    assert tuned.shape == ((5, 4) if transposed else (4, 5, *kernel))
    torch.testing.assert_close(tuned.delta().values.double(), expected, rtol=1e-5, atol=1e-6)


def expert_by_expert(tensors, transposed):
    """Oracle: the delta of each expert as a sum over its ranks, with experts running fastest in `B`."""
    down, up = (tensor.double() for tensor in tensors.values())
    found = []
    for expert in range(EXPERTS):
        total = sum(
            SCALING * torch.outer(up[:, rank * EXPERTS + expert], down[expert * RANK + rank]) for rank in range(RANK)
        )
        found.append(total.T if transposed else total)
    return torch.stack(found)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_means_the_product_of_each_expert(transposed):
    tuned = experts(transposed)
    found = torch.stack([one.values for one in tuned.delta().products])
    torch.testing.assert_close(found.double(), expert_by_expert(tuned.tensors, transposed), rtol=1e-5, atol=1e-6)


def use_of(tuned, number=0):
    first, second = tuned.shape[-2:]
    view = MatrixView.contiguous(first, second, number * first * second)
    return by_hand.use_of("w", tuned.shape, view=view.transposed if tuned.transposed else view)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_adjusted_pair_means_the_adjusted_product(transposed):
    tuned = low_rank(transposed)
    transform = Dense(matrix=torch.randn(5, 5))
    delta = tuned.delta().transformed(use_of(tuned), transform)
    found = replaced(tuned, tuned.adjusted(delta).tensors)
    before = tuned.delta().values.double()
    rows = before.T if transposed else before
    expected = rows @ transform.matrix.double()
    torch.testing.assert_close(
        found.delta().values.double(), expected.T if transposed else expected, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(found.tensors["B"], tuned.tensors["B"])


@pytest.mark.parametrize("transposed", [False, True])
def test_an_adjusted_expert_leaves_the_tensors_of_the_others(transposed):
    tuned = experts(transposed)
    size = FIRST if transposed else SECOND
    transform = Dense(matrix=torch.randn(size, size))
    found = tuned.adjusted(tuned.delta().transformed(use_of(tuned, 1), transform)).tensors
    before, after = (expert_by_expert(tensors, transposed) for tensors in (tuned.tensors, found))
    rows = before[1].T if transposed else before[1]
    expected = rows @ transform.matrix.double()
    torch.testing.assert_close(after[1], expected.T if transposed else expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("kind", ["low_rank", "experts", "bias", "token_rows", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_an_adapter_says_it_carries_is_what_its_tensors_mean(kind, dtype):
    made = {"low_rank": low_rank(False), "experts": experts(False), "bias": bias(1.7), "token_rows": token_rows(dtype)}
    tuned = (made | {"full": full()})[kind]
    tuned = replaced(tuned, {name: tensor.to(dtype) for name, tensor in tuned.tensors.items()})
    delta = tuned.delta()
    size = SECOND if kind in ("low_rank", "experts") else 1
    if size > 1:
        changed = delta.transformed(use_of(tuned), Dense(matrix=torch.randn(SECOND, SECOND)))
    else:
        changed = delta.keeping(delta.values / 3)
    found = tuned.adjusted(changed)
    assert all(found.tensors[name].dtype == own.dtype for name, own in tuned.tensors.items())
    again = replaced(tuned, dict(found.tensors)).delta()
    pairs = zip(getattr(again, "products", [again]), getattr(found.delta, "products", [found.delta]), strict=True)
    assert all(torch.equal(one.values, other.values) for one, other in pairs)
    whole = tuned.adjusted(delta)
    assert all(torch.equal(whole.tensors[name], own) for name, own in tuned.tensors.items())


def test_a_whole_parameter_has_the_delta_to_its_base():
    tuned = full()
    assert torch.equal(tuned.delta().values, tuned.tensors["w"] - tuned.base)
    assert torch.equal(tuned.adjusted(tuned.delta().zero()).tensors["w"], tuned.base)


@pytest.mark.parametrize("scaling", [0.5, 1.7, -3.0])
def test_a_bias_counts_times_the_scaling_of_its_lora(scaling):
    tuned = bias(scaling)
    torch.testing.assert_close(
        tuned.delta().values.double(), scaling * tuned.tensors["b"].double(), rtol=1e-5, atol=1e-6
    )
    half = tuned.delta().transformed(by_hand.use_of("b", (4,), Role.BIAS), Dense(matrix=torch.tensor([0.5])))
    torch.testing.assert_close(tuned.adjusted(half).tensors["b"], 0.5 * tuned.tensors["b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaced_rows_are_the_delta_and_every_other_row_has_none(dtype):
    tuned = token_rows(dtype)
    values = tuned.delta().values
    assert torch.equal(values[[4, 1]], tuned.tensors["rows"].float() - tuned.base[[4, 1]].float())
    assert not values[[0, 2, 3, 5]].any()
    assert torch.equal(tuned.adjusted(tuned.delta().zero()).tensors["rows"], tuned.base[[4, 1]])


def test_only_a_whole_parameter_can_take_any_delta():
    assert full().is_dense
    assert not any(tuned.is_dense for tuned in (bias(), token_rows(), low_rank(False), experts(False)))
