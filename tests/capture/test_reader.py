"""What is known of a tensor is what was said of it; what cannot be told of a weight is refused."""

import pytest
import torch
from torch import nn

from safedelta_hf.capture.reader import OperationReader
from safedelta_hf.capture.views import ParameterView


class Told:
    """Stands in for the collector, and remembers what it is told."""

    def __init__(self, *, table=True):
        self.told, self.table = [], table

    def product(self, weight, inputs, role):
        self.told.append(("product", weight.parameter))

    def lookup(self, weight, rows):
        self.told.append(("lookup", weight.parameter))

    def is_table(self, weight):
        return self.table

    def scale(self, *_):
        raise NotImplementedError

    offset = scale


def view(**changes):
    return ParameterView(**{"parameter": "w", "start": 0, "shape": (3, 4), "strides": (4, 1)} | changes)


def test_a_plain_product_is_told():
    told = Told()
    reader = OperationReader(told)
    reader.product(view(), torch.zeros(2, 4))
    reader.product(view(shape=(1, 4), strides=(0, 1)), torch.zeros(2, 4))  # nothing is repeated in a single row
    assert told.told == [("product", "w")] * 2 and reader.refused == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"strides": (0, 1)}, "its entries are repeated"), ({"slopes": torch.ones(12)}, "a slope of its own")],
)
def test_a_product_that_no_moment_describes_is_refused(changes, reason):
    told = Told()
    reader = OperationReader(told)
    reader.product(view(**changes), torch.zeros(2, 4))
    assert told.told == [] and reason in reader.refused["w"]


@pytest.mark.parametrize("table", [True, False])
def test_rows_are_looked_up_in_whole_tables_alone(table):
    told = Told(table=table)
    reader = OperationReader(told)
    reader.lookup(view(), torch.arange(3))
    assert told.told == [("lookup", "w")] * table
    assert reader.refused == ({} if table else {"w": "a part of it is looked up by row"})


def test_the_first_reason_counts():
    reader = OperationReader(Told())
    reader.refuse("w", "one")
    reader.refuse("w", "two")
    assert reader.refused == {"w": "one"}


def test_a_tensor_is_data_a_weight_a_mixture_or_a_constant():
    reader, data, weight, mixture, other = OperationReader(Told()), *(torch.zeros(2) for _ in range(4))
    reader.start_batch([data])
    reader.track(weight, "w")
    reader.mixtures.add([mixture])
    assert [reader.is_data(one) for one in (data, weight, mixture, other, 3)] == [True, *[False] * 4]
    assert [reader.is_constant(one) for one in (data, weight, mixture, other, 3)] == [*[False] * 3, True, False]
    assert [reader.name_of(one) for one in (data, weight, mixture, other)] == [None, "w", None, None]
    assert reader.view(weight).parameter == "w"
    reader.start_batch([other])
    assert reader.is_data(other) and reader.is_constant(data) and reader.name_of(weight) == "w"


def test_memory_that_was_made_for_a_weight_is_data_no_longer():
    reader, weight = OperationReader(Told()), torch.zeros(2)
    reader.data.add([weight])
    reader.mixtures.add([weight])
    reader.track(weight, "w")
    assert not reader.is_data(weight) and weight not in reader.mixtures


def test_a_parameter_that_is_fetched_later_is_found_where_it_is_met():
    reader, parameter = OperationReader(Told()), nn.Parameter(torch.empty(0))
    reader.track_when_loaded(parameter, "w")
    parameter.data = torch.zeros(3)
    assert reader.name_of(torch.zeros(3)) is None and reader.name_of(parameter) == "w"
    assert reader.name_of(parameter[1:]) == "w"


def test_a_parameter_that_is_gone_is_not_taken_for_another_at_its_place():
    reader, parameter = OperationReader(Told()), nn.Parameter(torch.zeros(3))
    reader.track_when_loaded(parameter, "w")
    key = id(parameter)
    del parameter
    assert reader._parameters[key][0]() is None
    reader.start_batch([])
    assert reader._parameters == {}
