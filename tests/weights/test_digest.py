"""A digest tells weights apart bit for bit, and is the same however the weight is dealt to processes."""

import hashlib
import itertools
import os

import pytest
import torch
from torch import nn

from safedelta_hf.distributed.model import Shard
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.weights.digest import (
    LEAST_ROW,
    digest,
    digest_of_shard,
    fingerprint,
    folder_identity,
    parameter_digest,
    source_identity,
)

GROUP = object()
"""Stands for the processes that hold the other shards."""


class Others:
    """The processes of a run, of which one is asked; the others answer as `digest_of_shard` would ask them to."""

    def __init__(self, shares):
        self.shares, self.exchanged = shares, 0

    def assembled(self, rows, start, size, group):
        assert group is GROUP
        parts = [share.to(rows.dtype) for share in self.shares(rows)]
        self.exchanged += sum(part.nbytes for part in parts)
        whole = torch.cat(parts)
        assert len(whole) == size and torch.equal(whole[start : start + len(rows)], rows)
        return whole


def written_out(tensor):
    """Oracle: the bytes of the rows one after another, each row digested by itself where it is long."""
    result = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    rows = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in tensor] if tensor.dim() > 1 else []
    if rows and len(rows[0]) >= LEAST_ROW:
        result.update(b"".join(hashlib.sha256(row).digest() for row in rows))
    else:
        result.update(hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest())
    return result.hexdigest()


SHAPES = [(5, 300), (5, 256), (5, 255), (6, 3), (7,), (4, 2, 200)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, ()])
def test_a_digest_is_that_of_dtype_shape_and_rows(shape, dtype):
    tensor = (torch.randn(shape) * 100).to(dtype)
    assert digest(tensor) == written_out(tensor)


@pytest.mark.parametrize("cuts", [(0, 0), (1, 1), (2, 4), (0, 3), (4, 4)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_digest_of_shards_is_that_of_the_whole_on_every_process(shape, cuts):
    whole = torch.randn(shape)
    places = list(itertools.pairwise([0, *cuts, shape[0]]))

    def shares(asked):
        parts = [whole[start:stop] for start, stop in places]
        if asked.dtype != torch.uint8:
            return parts
        digests = [[hashlib.sha256(row.numpy().tobytes()).digest() for row in part] for part in parts]
        return [torch.tensor([list(one) for one in part], dtype=torch.uint8).reshape(-1, 32) for part in digests]

    for start, stop in places:
        ranks, shard = Others(shares), Shard(start=start, stop=stop, size=shape[0], group=GROUP)
        assert digest_of_shard(whole[start:stop], whole.shape, shard, ranks) == digest(whole)
        assert ranks.exchanged <= max(32 * shape[0], LEAST_ROW * shape[0])


def test_what_a_process_holds_whole_is_digested_alone():
    whole = torch.randn(3, 300)
    assert digest_of_shard(whole, whole.shape, Shard.whole(whole.shape), None) == digest(whole)


def test_rows_of_another_shape_have_another_digest():
    whole = torch.randn(4, 300)
    shard = Shard(start=1, stop=3, size=4, group=GROUP)

    def shares(own):
        return [own.new_zeros(1, 32), own, own.new_zeros(1, 32)]

    assert digest_of_shard(torch.randn(3, 300), whole.shape, shard, Others(shares)) != digest(whole)


def test_dtype_shape_order_and_every_bit_count():
    one = torch.arange(24.0)
    variants = [
        one,
        one.reshape(4, 6),
        one.reshape(6, 4),
        one.reshape(4, 6).T,
        one.double(),
        one.half(),
        one.bfloat16(),
        one.view(torch.int32),
        one.flip(0),
        torch.cat([one[:-1], torch.nextafter(one[-1:], torch.tensor(99.0))]),
        torch.cat([-one[:1], one[1:]]),
    ]
    assert len({digest(variant) for variant in variants}) == len(variants)


def test_memory_layout_and_gradients_do_not_count():
    one = torch.randn(4, 300)
    assert digest(one.T.contiguous().T) == digest(nn.Parameter(one)) == digest(one.clone())


def test_a_parameter_is_looked_at_in_the_type_asked_for():
    model = open_model(nn.Linear(3, 2).bfloat16())
    weight = model.read("weight")
    assert parameter_digest(model, "weight") == digest(weight) == fingerprint(model)["weight"]
    assert parameter_digest(model, "weight", torch.float32) == digest(weight.float()) != digest(weight)


def test_a_folder_is_told_from_others_by_name_size_and_time(tmp_path):
    path = tmp_path / "folder" / "inner" / "file"
    path.parent.mkdir(parents=True)
    path.write_text("one")
    os.utime(path, ns=(1, 1))
    before = folder_identity(tmp_path / "folder")
    assert before == folder_identity(str(tmp_path / "folder")) == [("file", 3, 1)]
    path.write_text("two")
    os.utime(path, ns=(2, 2))
    assert folder_identity(tmp_path / "folder") != before
    assert folder_identity(tmp_path / "nowhere") is folder_identity(3) is None


def test_a_model_in_memory_is_told_from_others_by_its_weights(tmp_path):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    before = source_identity(one)
    assert before != source_identity(other)
    other.load_state_dict(one.state_dict())
    assert source_identity(other) == before
    assert source_identity(tmp_path) == folder_identity(tmp_path) == []
