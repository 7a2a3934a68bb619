"""A model in memory whose weights are compared with their base, and replaced."""

import copy

import pytest
import torch
from torch import nn

from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import BaseWeightsError, NumericalError
from safedelta_hf.model.store import ModelStore
from safedelta_hf.weights.digest import fingerprint
from safedelta_hf.weights.readers import ModelReader
from tests.fixtures import by_hand, tiny


@pytest.fixture
def base():
    return tiny.Plain()


def store_of(tuned, base, folder=None, **changes):
    opened = open_model(base)
    header = by_hand.header_of(base=fingerprint(opened), dtypes=opened.data_types, **changes)
    return ModelStore(open_model(tuned), ModelReader(base), header, folder)


def moved(base, *names, dtype=torch.float32):
    model = copy.deepcopy(base)
    for name in names:
        model.get_parameter(name).data += 0.25
    return model.to(dtype)


def test_exactly_the_parameters_that_moved_are_tuned(base):
    store = store_of(moved(base, "up.weight", "down.bias"), base)
    assert {name for name in tiny.weights(base) if store.is_tuned(name)} == {"up.weight", "down.bias"}
    assert all(store.is_dense(name) for name in tiny.weights(base))
    assert (store.architecture, store.source) == ("Plain", "a model in memory")


def test_the_same_weight_in_another_dtype_is_not_tuned(base):
    base = base.bfloat16()
    store = store_of(moved(base, "up.weight").float(), base)
    assert {name for name in tiny.weights(base) if store.is_tuned(name)} == {"up.weight"}


def test_a_delta_is_tuned_minus_base_and_its_parts_are_those_weights_bit_for_bit(base):
    tuned = moved(base, "up.weight")
    store = store_of(tuned, base)
    delta = store.delta("up.weight")
    assert torch.equal(delta.values, tuned.up.weight.detach() - base.up.weight.detach())
    assert torch.equal(delta.weight(), tuned.up.weight) and torch.equal(delta.zero().weight(), base.up.weight)


def test_a_base_is_read_in_the_type_in_which_its_profile_was_made(base):
    wide = copy.deepcopy(base).double()
    wide.up.weight.data += 1e-12  # lost in float32
    opened = open_model(base)
    header = by_hand.header_of(base=fingerprint(opened), dtypes=opened.data_types)
    store = ModelStore(open_model(moved(base, "up.weight")), ModelReader(wide), header)
    assert store.is_tuned("up.weight")
    assert torch.equal(store.delta("up.weight").base, base.up.weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_weight_is_named(value, base):
    tuned = moved(base, "up.weight")
    tuned.up.weight.data[1, 2] = value
    with pytest.raises(NumericalError, match=r"^up\.weight: .*NaN or Inf"):
        store_of(tuned, base).is_tuned("up.weight")


def test_another_base_and_another_shape_are_named(base):
    other = moved(base, "up.weight")
    opened = open_model(base)
    header = by_hand.header_of(base=fingerprint(opened), dtypes=opened.data_types)
    store = ModelStore(open_model(moved(base, "up.weight", "up.bias")), ModelReader(other), header)
    with pytest.raises(BaseWeightsError, match=r"^up\.weight: .*not that of the base"):
        store.is_tuned("up.weight")
    longer = copy.deepcopy(base)
    longer.embed = nn.Embedding(tiny.VOCABULARY + 2, 8)
    with pytest.raises(BaseWeightsError, match=r"embed\.weight: \[50, 8\] in the model, \[48, 8\] in the base"):
        store_of(longer, base).is_tuned("embed.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_stays_where_the_block_succeeds(dtype, base, tmp_path):
    base = base.to(dtype)
    tuned = moved(base, "up.weight", "down.bias", dtype=dtype)
    before, store = tiny.weights(tuned), store_of(tuned, base, tmp_path)
    with store:
        written = store.write("up.weight", store.delta("up.weight").zero())
        assert written.notes == () and written.delta.is_zero
        store.write("down.bias", store.delta("down.bias"))
    after = tiny.weights(tuned)
    assert torch.equal(after["up.weight"], base.up.weight)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "up.weight")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_block_puts_every_weight_back_bit_for_bit(error, base, tmp_path):
    tuned = moved(base, "up.weight", "down.bias")
    before, store = tiny.weights(tuned), store_of(tuned, base, tmp_path)
    with pytest.raises(error), store:
        for name in ("up.weight", "down.bias"):
            store.write(name, store.delta(name).zero())
        raise error
    assert tiny.same(tiny.weights(tuned), before)
    assert not list(tmp_path.iterdir())


def test_a_restore_puts_back_the_tuned_weights_which_may_be_written_again(base):
    tuned = moved(base, "up.weight")
    before, store = tiny.weights(tuned), store_of(tuned, base)
    with store:
        store.write("up.weight", store.delta("up.weight").zero())
        store.restore()
        assert tiny.same(tiny.weights(tuned), before)
        assert torch.equal(store.delta("up.weight").weight(), before["up.weight"])
        store.write("up.weight", store.delta("up.weight").zero())
    assert torch.equal(tuned.up.weight, base.up.weight)


class Doubled(nn.Module):
    def forward(self, original):
        return 2 * original

    def right_inverse(self, weight):
        return weight / 2


@pytest.fixture
def computed():
    """A base whose `up.weight` is computed, and what has to be told of it."""
    model = tiny.Plain()
    nn.utils.parametrize.register_parametrization(model.up, "weight", Doubled())
    return model, {"up.weight": ("up.parametrizations.weight.original",)}


ORIGINAL = "up.parametrizations.weight.original"


def test_a_computed_weight_is_tuned_where_any_of_its_originals_moved(computed):
    base, names = computed
    assert store_of(moved(base, ORIGINAL), base, parametrised=names).is_tuned("up.weight")
    assert not store_of(moved(base, "down.weight"), base, parametrised=names).is_tuned("up.weight")


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda delta: delta, "as tuned"),
        (lambda delta: delta.zero(), "are those of the base"),
        (lambda delta: delta.keeping(delta.values / 2), "were set by Doubled"),
    ],
    ids=["kept", "reset", "halved"],
)
def test_the_originals_of_a_computed_weight_are_set_so_that_it_carries_its_delta(change, note, computed):
    base, names = computed
    tuned = moved(base, ORIGINAL)
    store = store_of(tuned, base, parametrised=names)
    assert store.is_tuned("up.weight") and store.is_dense("up.weight")
    delta = store.delta("up.weight")
    torch.testing.assert_close(delta.values, torch.full((16, 8), 0.5))
    with store:
        written, (told,) = store.write("up.weight", change(delta))
    assert note in told
    assert torch.equal(written.values, tuned.up.weight - base.up.weight)
    torch.testing.assert_close(tuned.up.weight, base.up.weight + change(delta).values)
    with pytest.raises(RuntimeError), store:
        store.write("up.weight", change(store.delta("up.weight")).zero())
        raise RuntimeError
    torch.testing.assert_close(tuned.up.weight, base.up.weight + change(delta).values)
