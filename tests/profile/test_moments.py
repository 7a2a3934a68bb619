"""Moments by key: shapes are known without reading one, and each is read where it is, or named where it is not."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import CaptureError, ConfigurationError
from safedelta_hf.profile.moments import Moments, MomentStorage, ShardedMoments, SummedMoments, free_memory

CPU = torch.device("cpu")


def moment(size=3, *, full=True, sequences=2, tokens=5):
    inputs = torch.randn(tokens, size)
    total = inputs.T @ inputs if full else inputs.square().sum(0)
    return InputMoment(total=total, sequences=sequences, tokens=tokens)


class Unread(Moments):
    """Knows its shapes, and must not be read."""

    def __getitem__(self, key):
        pytest.fail(f"{key} was read")

    def shape(self, key):
        return self._entries[key]


def test_moments_in_memory_are_a_mapping_with_shapes():
    held = {"a": moment(), "b": moment(4, full=False)}
    moments = Moments(held)
    assert dict(moments) == held and list(moments) == ["a", "b"] and len(moments) == 2
    assert {key: moments.shape(key) for key in moments} == {"a": (3, 3), "b": (4,)}
    assert "a" in moments and "c" not in moments and moments.owner("a") is None
    with pytest.raises(KeyError):
        moments.shape("c")


def test_membership_iteration_and_length_read_nothing():
    moments = Unread({"a": (3, 3)})
    assert "a" in moments and "b" not in moments and list(moments) == ["a"] and len(moments) == 1


def test_the_identity_is_that_of_keys_values_and_counts():
    one = moment()
    same = replace(one, total=one.total.T.contiguous().T.clone())
    assert Moments({"a": one}).identity() == Moments({"a": same}).identity()
    nudged = one.total.clone()
    nudged[1, 2] = torch.nextafter(nudged[1, 2], torch.tensor(9.0))
    others = [
        {"b": one},
        {"a": replace(one, total=nudged)},
        {"a": replace(one, total=one.total.double())},
        {"a": replace(one, total=one.total.flatten())},
        {"a": replace(one, sequences=3)},
        {"a": replace(one, tokens=6)},
        {"a": one, "b": one},
        {},
    ]
    assert len({Moments(other).identity() for other in ({"a": one}, *others)}) == 9


def weighted(one, other):
    """What protects ordinary data beside the refusals: a half of the other sum."""
    parts = [part for part in (one, other and replace(other, total=0.5 * other.total)) if part is not None]
    return parts[0] if len(parts) == 1 else parts[0].merge(parts[1])


def test_sums_are_those_of_float64_whichever_side_has_a_moment():
    one, other = {"a": moment(), "b": moment(4)}, {"A": moment(), "C": moment(2, full=False)}
    sums = SummedMoments(Moments(one), Moments(other), {"a": "A", "c": "C"}, weighted)
    expected = {
        "a": one["a"].total.double() + 0.5 * other["A"].total.double(),
        "b": one["b"].total.double(),
        "c": 0.5 * other["C"].total.double(),
    }
    assert list(sums) == ["a", "b", "c"]
    for key, total in expected.items():
        torch.testing.assert_close(sums[key].total.double(), total, rtol=1e-6, atol=1e-6)
        assert sums.shape(key) == tuple(total.shape)
    assert (sums["a"].sequences, sums["a"].tokens, sums["b"].tokens) == (4, 10, 5)


def test_shapes_of_sums_are_known_without_reading():
    sums = SummedMoments(Unread({"a": (3, 3)}), Unread({"C": (2,)}), {"c": "C"}, weighted)
    assert {key: sums.shape(key) for key in sums} == {"a": (3, 3), "c": (2,)}


class Exchange:
    """Two ranks in one process: what the owner gives is there for the other."""

    def __init__(self, rank, box):
        self.rank, self.size, self.box = rank, 2, box

    def broadcast(self, value, owner):
        if self.rank == owner:
            self.box.append(value)
        return self.box[-1]


def test_a_moment_of_another_rank_is_named_and_can_be_brought():
    held, box = {"a": moment(), "b": moment(4)}, []
    owners, shapes = {"a": 0, "b": 1}, {"a": (3, 3), "b": (4, 4)}
    ranks = [ShardedMoments(shapes, owners, {key: held[key]}, Exchange(owners[key], box)) for key in owners]
    for rank, (own, other) in enumerate([("a", "b"), ("b", "a")]):
        moments = ranks[rank]
        assert moments[own] is held[own] and {key: moments.shape(key) for key in moments} == shapes
        assert moments.owner(other) == 1 - rank
        with pytest.raises(CaptureError, match=f"^{other}: its moment is held by rank {1 - rank}, not by rank {rank}"):
            moments[other]
    assert [moments.brought("a", receiver=1) for moments in ranks] == [None, held["a"]]
    assert len(box) == 1
    assert [moments.brought("a", receiver=0) for moments in ranks] == [held["a"], None]


def test_a_budget_is_spent_in_order_and_the_rest_goes_to_files_that_go_with_it(tmp_path):
    storage = MomentStorage(4 * (9 + 4), tmp_path / "made" / "here")
    shapes = [(3, 3), (2, 2), (1,), (4, 4)]
    totals = [storage.allocate(shape, CPU) for shape in shapes]
    assert [tuple(total.shape) for total in totals] == shapes
    assert all(total.dtype == torch.float32 and not total.any() for total in totals)
    files = list((tmp_path / "made" / "here").rglob("*.f32"))
    assert sorted(path.stat().st_size for path in files) == [4, 64]
    totals[3].add_(1)
    assert totals[3].sum() == 16 and not totals[2].any()
    del storage
    gc.collect()
    assert not list((tmp_path / "made" / "here").iterdir())


def test_a_smaller_moment_still_fits_after_one_that_did_not(tmp_path):
    storage = MomentStorage(4 * 10, tmp_path)
    for shape in [(3, 3), (3, 3), (1,)]:
        storage.allocate(shape, CPU)
    assert len(list(tmp_path.rglob("*.f32"))) == 1


def test_without_a_folder_host_memory_takes_the_rest_of_a_device_and_nothing_takes_that_of_the_host():
    storage = MomentStorage(0)
    elsewhere = storage.allocate((2, 2), SimpleNamespace(type="cuda"))
    assert elsewhere.device == CPU and not elsewhere.any()
    with pytest.raises(ConfigurationError, match="offload_folder=DIR"):
        storage.allocate((2, 2), CPU)
    assert MomentStorage().allocate((50, 50), CPU).shape == (50, 50)


@pytest.mark.parametrize(
    ("device_free", "host_free", "place"), [(1000, 0, "device"), (10, 1000, "host"), (10, 10, "file")]
)
def test_without_a_budget_a_moment_goes_where_there_is_room(device_free, host_free, place, monkeypatch, tmp_path):
    free = {"meta": device_free, "cpu": host_free}
    monkeypatch.setattr("safedelta_hf.profile.moments.free_memory", lambda device: free[device.type])
    storage = MomentStorage(offload_folder=tmp_path)
    total = storage.allocate((4, 4), torch.device("meta"))
    assert total.device.type == ("meta" if place == "device" else "cpu") and tuple(total.shape) == (4, 4)
    assert len(list(tmp_path.rglob("*.f32"))) == (place == "file")


def test_without_a_budget_and_without_room_anywhere_a_moment_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr("safedelta_hf.profile.moments.free_memory", lambda device: 10)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=50))
    with pytest.raises(ConfigurationError, match="neither in memory nor in .*offload_folder=DIR on a larger disk"):
        MomentStorage(offload_folder=tmp_path).allocate((4, 4), CPU)


def test_what_is_free_is_looked_at_again_before_it_is_given_away(monkeypatch):
    free, looks = [800.0], []
    monkeypatch.setattr("safedelta_hf.profile.moments.free_memory", lambda device: looks.append(device) or free[0])
    storage, rows = MomentStorage(), torch.zeros(10)
    assert all(storage.takes(rows) for _ in range(2)) and len(looks) == 1
    free[0] = 30.0
    assert not storage.takes(torch.zeros(10)) and len(looks) == 2


def test_of_a_container_its_limit_counts_and_a_share_stays_free(monkeypatch, tmp_path):
    whole = free_memory(CPU)
    assert 0 < whole < psutil.virtual_memory().total
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 5\ninactive_file 200\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("safedelta_hf.profile.moments._LIMITS", tmp_path)
    assert free_memory(CPU) == pytest.approx(1000 - 700 + 200 - 100)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == pytest.approx(whole, rel=0.5)
