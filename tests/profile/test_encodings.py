import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safedelta_hf.core.low_rank import LowRank, dense
from safedelta_hf.errors import ConfigurationError
from safedelta_hf.profile.encodings import (
    ENCODINGS,
    Bfloat16,
    Eigenbasis,
    Factor,
    Float32,
    Triangular,
    encoding_for,
    encoding_of,
)
from safedelta_hf.profile.encodings.triangular import mirror_, pack_upper, unpack_upper
from safedelta_hf.profile.files import require_moment

KINDS = [Float32(), Triangular(), Bfloat16(), Eigenbasis(rank=4)]


def moment(size, tokens, power=1.0, seed=0, dead=0):
    """Sum of products of inputs whose variances fall as a power law; the first few are never active."""
    generator = torch.Generator().manual_seed(seed)
    directions, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    spread = torch.arange(1, size + 1).float() ** (-power / 2)
    inputs = torch.randn(tokens, size, generator=generator) * spread @ directions.T
    inputs[:, :dead] = 0
    return inputs.T @ inputs


def through(kind, total):
    return dense(kind.decode(kind.encode(total)))


def relative(found, total):
    return float((found - total).norm() / total.norm())


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 1030])
def test_packing_the_upper_half_and_mirroring_it_gives_a_symmetric_matrix_back(size):
    total = torch.randn(size, size)
    total = total + total.T
    packed = pack_upper(total)
    rows, columns = torch.triu_indices(size, size)
    assert torch.equal(packed, total[rows, columns])
    assert torch.equal(unpack_upper(packed), torch.triu(total))
    assert torch.equal(mirror_(unpack_upper(packed)), total)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@given(size=st.integers(1, 40), tokens=st.integers(1, 60), dead=st.integers(0, 5), seed=st.integers(0, 9))
def test_tensors_are_as_laid_out_and_what_is_read_is_a_moment(kind, size, tokens, dead, seed):
    total = moment(size, tokens, dead=min(dead, size - 1), seed=seed)
    kind = encoding_for((size, size), kind)
    stored = kind.encode(total)
    layouts = kind.layouts((size, size))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == {
        name: (layout.dtype, layout.shape) for name, layout in layouts.items()
    }
    assert kind.bytes((size, size)) == sum(tensor.nbytes for tensor in stored.values())
    require_moment(kind.decode(stored), "it")
    found = dense(kind.decode(stored))
    least = torch.linalg.eigvalsh(found.double())[0]
    assert least >= -1e-5 * total.diagonal().mean()
    assert not found[:dead, :dead].any() or dead >= size
    assert all(torch.equal(one, other) for one, other in zip(stored.values(), kind.encode(total).values(), strict=True))


@pytest.mark.parametrize("kind", [Float32(), Triangular()], ids=str)
def test_exact_kinds_are_exact(kind):
    total = moment(60, 100)
    assert torch.equal(through(kind, total), total)


@pytest.mark.parametrize("tokens", [20, 400])
def test_bfloat16_keeps_small_eigenvalues_that_rounding_the_moment_itself_would_make_negative(tokens):
    total = moment(200, tokens, power=2.0)
    mean = total.diagonal().mean()
    exact, found, rounded = (
        torch.linalg.eigvalsh(kept.double()) for kept in (total, through(Bfloat16(), total), total.bfloat16().float())
    )
    assert rounded[0] < -0.01 * mean  # more than the usual damping makes up for
    assert abs(found[0] - exact[0]) < 1e-4 * mean
    assert relative(through(Bfloat16(), total), total) < 5e-3
    assert not torch.linalg.cholesky_ex(through(Bfloat16(), total) + 1e-4 * mean * torch.eye(200)).info


def test_bfloat16_is_no_better_where_inputs_are_smaller():
    total = moment(60, 100)
    scale = torch.logspace(-6, 6, 60)
    assert relative(through(Bfloat16(), total * scale * scale[:, None]) / scale / scale[:, None], total) < 1e-2


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [1e-25, 1e-23, 3e-22, 1e-18, 1e-12])
def test_inputs_whose_squares_are_lost_in_float32_do_no_harm(kind, size):
    inputs = torch.randn(80, 40)
    inputs[:, :3] *= size
    inputs[:, 3:] *= torch.arange(1, 38) ** -2.0
    total = inputs.T @ inputs
    require_moment(total, "it")
    found = through(kind, total)
    require_moment(found, "it")
    limit = {"bfloat16": 2.0**-7, "eigenbasis": 0.05}.get(kind.name, 0.0)
    assert relative(found, total) <= limit
    torch.testing.assert_close(found.diagonal(), total.diagonal(), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(("size", "tokens"), [(100, 30), (100, 500)])
def test_the_eigenbasis_is_as_near_as_eigenvectors_found_in_full(size, tokens):
    total = moment(size, tokens)
    values, vectors = torch.linalg.eigh(total.double())
    for rank in (4, 12):
        largest = vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].T
        best = largest + torch.diag((total.double() - largest).diagonal())
        found = through(Eigenbasis(rank=rank), total)
        assert relative(found.double(), total) <= 1.05 * relative(best, total)
        torch.testing.assert_close(found.diagonal(), total.diagonal(), rtol=1e-4, atol=1e-4)


def test_the_eigenbasis_of_a_moment_of_low_rank_is_the_moment():
    total = moment(60, 5)
    assert relative(through(Eigenbasis(rank=5), total), total) < 1e-5


def test_the_eigenbasis_does_not_move_the_random_numbers_of_others():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    through(Eigenbasis(rank=2), moment(20, 10))
    assert torch.equal(torch.rand(4), expected)


def test_a_rank_that_saves_nothing_is_stored_exactly_and_diagonals_always_are():
    assert encoding_for((16, 16), Eigenbasis(rank=8)) == Triangular()
    assert encoding_for((16, 16), Eigenbasis(rank=4)) == Eigenbasis(rank=4)
    assert all(encoding_for((16,), kind) == Float32() for kind in KINDS)


def test_every_kind_has_a_text_that_names_it():
    assert {kind.name for kind in (*KINDS, Factor(rank=3))} == set(ENCODINGS)
    assert all(encoding_of(str(kind)) == kind == encoding_of(kind) for kind in KINDS)
    assert encoding_of("factor:3", is_stored=True) == Factor(rank=3)


@pytest.mark.parametrize("storage", ["factor:3", "factor", Factor(rank=3)])
def test_a_factor_is_not_asked_for(storage):
    with pytest.raises(ConfigurationError, match="cannot be asked for.*'triangular'"):
        encoding_of(storage)


@pytest.mark.parametrize(("rank", "size"), [(1, 9), (4, 9), (7, 40)])
def test_a_factor_is_exact_and_tells_of_no_row_by_itself(rank, size):
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(rank))
    kind = encoding_for((size, size), Triangular(), rank)
    stored = kind.encode(LowRank(factor=rows))
    assert kind == Factor(rank=rank) and kind.bytes((size, size)) == stored["factor"].nbytes
    assert not stored["factor"].tril(-1).any()
    found = kind.decode(stored)
    assert found.rank == rank
    torch.testing.assert_close(found.dense(), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_a_factor_is_stored_where_it_is_smaller_than_what_is_exact_and_nowhere_else():
    assert encoding_for((9, 9), Triangular(), 5) == encoding_for((9, 9), Triangular()) == Triangular()
    assert encoding_for((9, 9), Float32(), 1) == Float32() and encoding_for((9, 9), Bfloat16(), 1) == Bfloat16()
    assert encoding_for((16, 16), Eigenbasis(rank=8), 2) == Factor(rank=2)  # which saves nothing, and is exact


def test_a_moment_whose_halves_differ_by_rounding_is_stored_by_its_upper_half():
    total = moment(30, 50)
    total[20, 3] *= 1 + 1e-6
    found = through(Triangular(), total)
    assert torch.equal(torch.triu(found), torch.triu(total)) and torch.equal(found, found.T)
