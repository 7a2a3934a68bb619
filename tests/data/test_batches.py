"""Every sequence is read once, beside others of its length."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from safedelta_hf.data.batches import (
    arguments_of,
    batches_of_equal_length,
    forward_guard,
    input_device,
    require_fit,
    share_of,
)
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import DataError
from tests.distributed.test_offload import offloaded
from tests.fixtures import tiny


def test_inputs_go_where_the_model_runs(tmp_path):
    model = offloaded("disk", tmp_path)
    assert next(model.parameters()).is_meta
    assert input_device(model) == torch.device("cpu")
    assert input_device(cpu_offload(nn.Linear(4, 4), execution_device="cuda:1")) == torch.device("cuda:1")


def sequence(length, mark=0):
    return SafetySequence(input_ids=(mark, *range(1, length)), labels=(IGNORED, *range(1, length)))


DRAWN = [sequence(length, mark) for mark, length in enumerate([3, 5, 3, 2, 5, 5, 3, 3, 9, 2])]


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_batches_of_equal_length_hold_every_sequence_once_the_longest_first(size):
    batches = list(batches_of_equal_length(DRAWN, size))
    lengths = [{len(one.input_ids) for one in batch} for batch in batches]
    assert sorted(one.input_ids for batch in batches for one in batch) == sorted(one.input_ids for one in DRAWN)
    assert all(len(found) == 1 for found in lengths) and all(1 <= len(batch) <= size for batch in batches)
    order = [max(found) for found in lengths]
    assert order == sorted(order, reverse=True)
    # As few as can be: all but the last of a length are full.
    assert len(batches) == sum(-(-sum(len(one.input_ids) == n for one in DRAWN) // size) for n in (2, 3, 5, 9))
    assert list(batches_of_equal_length([], size)) == []


class Rank(Ranks):
    """One of several processes, none of which runs."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size = rank, size


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
@pytest.mark.parametrize("collective", [False, True])
def test_the_ranks_read_every_sequence_once_and_run_alike_where_they_have_to(collective, ranks):
    shares = [
        share_of(DRAWN, 2, SimpleNamespace(ranks=Rank(rank, ranks), collective=collective)) for rank in range(ranks)
    ]
    counted = [one for share in shares for batch, counts in share if counts for one in batch]
    assert sorted(one.input_ids for one in counted) == sorted(one.input_ids for one in DRAWN)
    assert len({len(share) for share in shares}) == 1 or not collective
    assert collective or all(counts for share in shares for _, counts in share)
    assert all(batch for share in shares for batch, _ in share)


class Accepts(nn.Module):
    def forward(self, input_ids, attention_mask=None, labels=None):
        raise NotImplementedError


class NeedsLabels(nn.Module):
    def forward(self, input_ids, labels):
        raise NotImplementedError


def test_a_model_is_given_what_its_forward_accepts(llama):
    batch = [sequence(3, 7), sequence(3, 8)]
    ids = torch.tensor([[7, 1, 2], [8, 1, 2]])
    given = {model: arguments_of(model, batch) for model in (llama, Accepts(), NeedsLabels(), tiny.Plain())}
    assert [set(found) for found in given.values()] == [
        {"input_ids", "attention_mask", "use_cache"},
        {"input_ids", "attention_mask"},
        {"input_ids", "labels"},
        {"input_ids"},
    ]
    assert all(found["input_ids"].equal(ids) for found in given.values())
    assert given[llama]["attention_mask"].equal(torch.ones_like(ids)) and given[llama]["use_cache"] is False
    assert list(given.values())[2]["labels"].equal(torch.tensor([[IGNORED, 1, 2]] * 2))


def test_what_a_model_has_no_positions_or_embeddings_for_is_named(llama):
    require_fit(llama, [[0, tiny.VOCABULARY - 1], list(range(32))], "data")
    require_fit(llama, [], "data")
    require_fit(nn.Linear(2, 2), [[10**6] * 1000], "data")
    with pytest.raises(DataError, match=r"^data: the longest .* 33 tokens, the model takes 32; .*max_length=32"):
        require_fit(llama, [[1], [1] * 33], "data")
    with pytest.raises(
        DataError, match=f"^data: token id {tiny.VOCABULARY} lies outside .* {tiny.VOCABULARY} embeddings"
    ):
        require_fit(llama, [[1, tiny.VOCABULARY]], "data")


def test_a_model_without_a_limit_of_positions_takes_any_length():
    model = nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=-1)
    require_fit(model, [[1] * 1000], "data")


def test_a_forward_pass_is_guarded_where_others_wait_in_it():
    entered = []

    @contextmanager
    def guard():
        entered.append(True)
        yield

    for collective in (False, True):
        with forward_guard(SimpleNamespace(ranks=SimpleNamespace(within_collectives=guard), collective=collective)):
            assert entered == [True] * collective


def test_inputs_go_where_the_first_weight_in_memory_is():
    assert input_device(nn.Identity()) == torch.device("cpu")
    mixed = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert input_device(mixed) == torch.device("cpu")
