"""What the loop may rely on, whatever keeps the weights."""

import pytest
import torch

from safedelta_hf.adapter.store import AdapterInFiles, AdapterInMemory
from safedelta_hf.deltas.lora_deltas import FullDelta
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.model.store import ModelStore
from safedelta_hf.report.records import ParameterRecord
from safedelta_hf.weights.digest import fingerprint
from safedelta_hf.weights.readers import ModelReader
from tests.fixtures import by_hand, tiny

NAMES = ("up.weight", "down.bias")


def whole(model, base):
    """An adapter that carries two parameters whole."""
    return [
        FullDelta(
            parameter=name,
            shape=tuple(parameter.shape),
            tensors={name: parameter.detach().clone()},
            base=base.get_parameter(name).detach(),
        )
        for name, parameter in model.named_parameters()
        if name in NAMES
    ]


def model_store(model, base, folder, written):
    opened = open_model(base)
    header = by_hand.header_of(base=fingerprint(opened), dtypes=opened.data_types)
    return ModelStore(open_model(model), ModelReader(base), header, folder)


def adapter_in_memory(model, base, folder, written):
    return AdapterInMemory(whole(model, base), open_model(model), folder, name="default", architecture="Plain")


def adapter_in_files(model, base, folder, written):
    store = AdapterInFiles(
        whole(model, base), lambda tensors, _: written.update(tensors), architecture="Plain", source="a base"
    )
    store.conclude(by_hand.report())
    return store


@pytest.fixture(params=[model_store, adapter_in_memory, adapter_in_files])
def case(request, tmp_path):
    """A store, a way to see what it holds now, and base and tuned weights."""
    base, model, written = tiny.Plain(), tiny.Plain(), {}
    model.load_state_dict(base.state_dict())
    tiny.perturbed(model)
    tuned = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    store = request.param(model, base, tmp_path, written)

    def now():
        held = tuned | written if request.param is adapter_in_files else tiny.weights(model)
        return {name: held[name] for name in NAMES}

    return store, now, {name: base.get_parameter(name).detach() for name in NAMES}, tuned


def test_a_delta_is_tuned_minus_base_and_is_whole_where_any_delta_can_be_written(case):
    store, _, base, tuned = case
    for name in NAMES:
        assert store.is_tuned(name) and store.is_dense(name)
        assert torch.equal(store.delta(name).values, tuned[name] - base[name])


def test_what_is_written_is_there_once_the_block_has_ended(case):
    store, now, base, tuned = case
    with store:
        store.write("up.weight", store.delta("up.weight").zero())
        store.write("down.bias", store.delta("down.bias"))
    assert torch.equal(now()["up.weight"], base["up.weight"])
    assert torch.equal(now()["down.bias"], tuned["down.bias"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_the_block_on_an_exception_undoes_every_write(error, case):
    store, now, _, tuned = case
    with pytest.raises(error), store:
        for name in NAMES:
            store.write(name, store.delta(name).zero())
        raise error
    assert tiny.same(now(), tuned)


def test_a_restore_undoes_every_write_and_each_may_be_repeated(case):
    store, now, base, tuned = case
    with store:
        for name in NAMES:
            store.write(name, store.delta(name).zero())
        store.restore()
        for name in NAMES:
            assert torch.equal(store.delta(name).weight(), tuned[name])
        store.write("up.weight", store.delta("up.weight").zero())
    assert torch.equal(now()["up.weight"], base["up.weight"])
    assert torch.equal(now()["down.bias"], tuned["down.bias"])


def test_being_told_that_a_parameter_is_finished_changes_nothing(case):
    store, now, _, tuned = case
    with store:
        store.finish(ParameterRecord(parameter="up.weight", shape=(16, 8), outcome="kept"))
    assert tiny.same(now(), tuned)
