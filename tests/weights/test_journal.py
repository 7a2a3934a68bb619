import pytest
import torch
from safetensors.torch import load_file

from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.weights.journal import Journal, base_weights_loaded
from safedelta_hf.weights.readers import ModelReader
from tests.fixtures import tiny


def zeroed(model, journal, count):
    opened = open_model(model)
    for name, parameter in list(model.named_parameters())[:count]:
        journal.replace(opened.parameter(name), torch.zeros_like(parameter))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failed_block_puts_every_weight_back_bit_for_bit(tmp_path, error, dtype):
    model = tiny.llama().to(dtype)
    before = tiny.weights(model)
    with pytest.raises(error), Journal(tmp_path) as journal:
        zeroed(model, journal, 5)
        raise error
    assert tiny.same(before, tiny.weights(model))
    assert not list(tmp_path.iterdir())


def test_a_weight_replaced_twice_goes_back_to_the_first_value(tmp_path):
    model = tiny.Plain()
    before = tiny.weights(model)
    with pytest.raises(RuntimeError), Journal(tmp_path) as journal:
        weight = open_model(model).parameter("up.weight")
        journal.replace(weight, torch.zeros(16, 8))
        journal.replace(weight, torch.ones(16, 8))
        raise RuntimeError
    assert tiny.same(before, tiny.weights(model))


def test_a_block_that_succeeds_leaves_the_new_weights_and_no_files(tmp_path):
    model = tiny.llama()
    with Journal(tmp_path) as journal:
        zeroed(model, journal, 3)
    assert all(not parameter.any() for parameter in list(model.parameters())[:3])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_stands_in_and_the_tuned_weights_come_back(tmp_path, fails):
    base, model = tiny.llama(), tiny.perturbed(tiny.llama())
    tuned, parameters = tiny.weights(model), dict(model.named_parameters())
    try:
        with base_weights_loaded(open_model(model), parameters, ModelReader(base), tmp_path):
            assert tiny.same(tiny.weights(base), tiny.weights(model))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert tiny.same(tuned, tiny.weights(model))


def test_a_closed_journal_refuses(tmp_path):
    weight = open_model(tiny.Plain()).parameter("up.weight")
    with pytest.raises(RuntimeError, match="context manager"):
        Journal(tmp_path).replace(weight, torch.ones(16, 8))


def test_a_restore_that_is_interrupted_keeps_the_originals_and_says_where(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = tiny.Plain()
    before = tiny.weights(model)
    with pytest.raises(KeyboardInterrupt) as raised, Journal(tmp_path) as journal:
        zeroed(model, journal, 3)
        monkeypatch.setattr("safedelta_hf.weights.journal.load_file", interrupt)
        raise RuntimeError
    (folder,) = tmp_path.iterdir()
    assert str(folder) in raised.value.__notes__[0] and "3 weights" in raised.value.__notes__[0]
    kept = {}
    for path in folder.iterdir():
        kept |= load_file(path)
    assert kept.keys() == {name for name, _ in list(model.named_parameters())[:3]}
    assert all(torch.equal(kept[name], before[name]) for name in kept)
