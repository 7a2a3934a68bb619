import pytest
import torch
from torch import nn

from safedelta_hf.distributed import open_model as module
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.zero import MirroredModel, PartitionedModel
from safedelta_hf.errors import ConfigurationError


def marked(**attributes):
    """A model, one parameter of which a library has marked."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    for name, value in attributes.items():
        setattr(model[1].weight, name, value)
    return model


def test_a_model_that_nothing_distributes_is_held_whole():
    model = marked()
    opened = open_model(model)
    assert type(opened) is ShardedModel and opened.model is model and opened.is_local
    assert opened.names == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_a_model_that_is_open_is_returned_as_it_is():
    opened = open_model(marked())
    assert open_model(opened) is opened


@pytest.mark.parametrize(
    ("attributes", "backend"),
    [
        ({"ds_id": 3}, PartitionedModel),
        ({"_hp_mapping": None}, MirroredModel),
        ({"ds_id": 3, "_hp_mapping": None}, PartitionedModel),
        ({"something": 1}, None),
    ],
)
def test_a_backend_is_told_by_what_it_leaves_on_parameters_and_the_first_that_fits_is_taken(
    attributes, backend, monkeypatch
):
    opened = [(fits, lambda model, ranks, kind=kind: kind) for fits, kind in module.BACKENDS]
    monkeypatch.setattr(module, "BACKENDS", tuple(opened))
    found = open_model(marked(**attributes))
    assert found is backend if backend else type(found) is ShardedModel


def test_weights_without_values_are_refused():
    model = marked()
    model[0].weight = nn.Parameter(torch.empty(2, 3, device="meta"))
    with pytest.raises(ConfigurationError, match=r"^Sequential: some of its weights are on the meta device.*load it"):
        open_model(model)
