"""The tensors of an adapter are replaced where they are held, or handed over once all of them are known."""

import pytest
import torch

from safedelta_hf.adapter.store import AdapterInFiles, AdapterInMemory
from safedelta_hf.deltas.lora_deltas import FullDelta, LowRankDelta
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import AdapterError, NumericalError
from tests.fixtures import by_hand, tiny


def pair(parameter="up.weight", rank=2, **tensors):
    """A LoRA pair; the tensors go by the names of two parameters of the same shapes."""
    own = {"a": torch.randn(rank, 5), "b": torch.randn(4, rank)} | tensors
    return LowRankDelta(parameter=parameter, shape=(4, 5), tensors=own, scaling=1.0, transposed=False)


def in_files(*deltas):
    finished = []
    store = AdapterInFiles(deltas, lambda tensors, _: finished.append(tensors), architecture="Plain", source="a base")
    store.conclude(by_hand.report())
    return store, finished


def test_shapes_and_forms_are_those_of_the_deltas():
    whole = FullDelta(parameter="head.weight", shape=(3, 2), tensors={"h": torch.ones(3, 2)}, base=torch.zeros(3, 2))
    store, _ = in_files(pair(), whole)
    assert store.shapes == {"up.weight": (4, 5), "head.weight": (3, 2)}
    assert store.is_dense("head.weight") and not store.is_dense("up.weight")
    assert (store.architecture, store.source, store.running) == ("Plain", "a base", None)


def test_an_adapter_whose_b_is_still_zero_tuned_nothing():
    store, _ = in_files(pair(b=torch.zeros(4, 2)), pair("down.weight"))
    assert not store.is_tuned("up.weight") and store.is_tuned("down.weight")


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"a": torch.zeros(0, 5), "b": torch.zeros(4, 0)}, AdapterError, r"^a: has the shape \[0, 5\].*rank 0"),
        ({"b": torch.full((4, 2), torch.nan)}, NumericalError, "^b: .*NaN"),
        ({"a": torch.full((2, 5), torch.inf)}, NumericalError, "^a: .*Inf"),
    ],
)
def test_a_tensor_that_cannot_be_used_is_named(tensors, error, message):
    store, _ = in_files(pair(**tensors))
    with pytest.raises(error, match=message):
        store.is_tuned("up.weight")


def test_a_parameter_that_is_tuned_in_two_places_is_refused():
    with pytest.raises(AdapterError, match=r"up\.weight: the adapter tunes it in two places, by a and by a"):
        in_files(pair(), pair())


def test_all_that_was_replaced_is_handed_over_once_the_block_has_succeeded():
    tuned = pair()
    store, finished = in_files(tuned, pair("down.weight"))
    with store:
        assert store.write("up.weight", store.delta("up.weight").zero()).notes == ()
        assert finished == []
    (replaced,) = finished
    assert torch.equal(replaced["a"], torch.zeros(2, 5)) and torch.equal(replaced["b"], tuned.tensors["b"])
    assert replaced.keys() == {"a", "b"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_handed_over_where_the_block_failed(error):
    store, finished = in_files(pair())
    with pytest.raises(error), store:
        store.write("up.weight", store.delta("up.weight"))
        raise error
    assert finished == []


def test_what_was_replaced_before_a_restore_is_not_handed_over():
    store, finished = in_files(
        pair(), FullDelta(parameter="n", shape=(2,), tensors={"n": torch.ones(2)}, base=torch.zeros(2))
    )
    with store:
        store.write("up.weight", store.delta("up.weight").zero())
        store.restore()
        store.write("n", store.delta("n").zero())
    assert [set(tensors) for tensors in finished] == [{"n"}]


def test_the_write_tells_what_the_types_of_the_adapter_hold():
    half = {"a": torch.randn(2, 5).bfloat16(), "b": torch.randn(4, 2).bfloat16()}
    store, finished = in_files(pair(**half))
    with store:
        delta = store.delta("up.weight")
        changed = type(delta)(*half.values().__reversed__(), 1.0, tuple(factor / 3 for factor in delta.factors))
        written = store.write("up.weight", changed).delta
    ((replaced,),) = (finished,)
    assert torch.equal(written.values, replaced["b"].float() @ replaced["a"].float())
    assert not torch.equal(written.values, changed.values)


@pytest.fixture
def model():
    """Its two linear weights play `A` [16, 8] and `B` [48, 16] of an adapter on a parameter elsewhere."""
    return tiny.Plain()


def in_memory(model, folder):
    opened = open_model(model)
    tensors = {name: opened.gather(name) for name in ("up.weight", "down.weight")}
    delta = LowRankDelta(parameter="w", shape=(48, 8), tensors=tensors, scaling=1.0, transposed=False)
    return AdapterInMemory([delta], opened, folder, name="default", architecture="Plain")


def test_the_tensors_of_a_model_are_replaced_in_place_and_nothing_else_is(model, tmp_path):
    before, store = tiny.weights(model), in_memory(model, tmp_path)
    assert store.running.model is model
    with store:
        store.write("w", store.delta("w").zero())
    after = tiny.weights(model)
    assert not after["up.weight"].any()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "up.weight")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_puts_the_tensors_of_a_model_back_bit_for_bit(error, model, tmp_path):
    before, store = tiny.weights(model), in_memory(model, tmp_path)
    with pytest.raises(error), store:
        store.write("w", store.delta("w").zero())
        raise error
    assert tiny.same(tiny.weights(model), before)


def test_a_restore_puts_the_tensors_back_and_they_may_be_written_again(model, tmp_path):
    before, store = tiny.weights(model), in_memory(model, tmp_path)
    with store:
        tuned = store.delta("w")
        store.write("w", tuned.zero())
        store.restore()
        assert tiny.same(tiny.weights(model), before)
        store.write("w", tuned.zero())
    assert not model.up.weight.any()
