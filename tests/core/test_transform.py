import pytest
import torch

from safedelta_hf.core import transform as transform_module
from safedelta_hf.core.transform import Dense, KeepColumns, SymmetricForm

KEPT = torch.tensor([True, False, True, False, False])


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def as_matrix(kept, response):
    """Oracle: the transform written out, [in, in] float64."""
    matrix = torch.zeros(len(kept), len(kept), dtype=torch.float64)
    selected, others = kept.nonzero().flatten().tolist(), (~kept).nonzero().flatten().tolist()
    for row, m in enumerate(selected):
        matrix[m, m] = 1.0
        for column, n in enumerate(others):
            matrix[m, n] = 0.0 if response is None else response[row, column]
    return matrix


@pytest.mark.parametrize("response", [None, drawn(2, 3)], ids=["bare", "compensated"])
def test_keeping_columns_is_a_multiplication_from_the_right(response):
    rows = torch.randn(4, 5)
    found = KeepColumns(kept=KEPT, response=response)(rows)
    torch.testing.assert_close(found.double(), rows.double() @ as_matrix(KEPT, response), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, KEPT], rows[:, KEPT])


@pytest.mark.parametrize("matrix", [drawn(5, 5), drawn(5, 3), drawn(5)])
def test_a_dense_transform_multiplies_by_its_matrix_or_diagonal(matrix):
    rows = torch.randn(4, 5)
    whole = matrix.diag() if matrix.ndim == 1 else matrix
    torch.testing.assert_close(
        Dense(matrix=matrix)(rows).double(), rows.double() @ whole.double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("block", [1, 2, 3, 5, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_of_a_symmetric_matrix_gives_its_quadratic_form(block, dtype, monkeypatch):
    monkeypatch.setattr(transform_module, "FORM_BLOCK", block)
    rows, root = drawn(4, 5), drawn(5, 6)
    matrix = root @ root.T
    exact = (rows.double() @ matrix.double() * rows).sum()
    rows = rows.to(dtype)
    assert float((rows * SymmetricForm(matrix=matrix)(rows)).sum()) == pytest.approx(float(exact), rel=1e-6)


def test_half_of_a_symmetric_matrix_never_looks_below_its_diagonal_blocks(monkeypatch):
    monkeypatch.setattr(transform_module, "FORM_BLOCK", 2)
    rows, matrix = drawn(4, 5), drawn(5, 5)
    half = (
        torch.block_diag(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 1)).bool() | torch.ones(5, 5).triu().bool()
    )
    spoilt = torch.where(half, matrix, float("nan"))
    assert torch.equal(SymmetricForm(matrix=spoilt)(rows), SymmetricForm(matrix=matrix)(rows))


TRANSFORMS = [
    KeepColumns(kept=KEPT, response=drawn(2, 3)),
    KeepColumns(kept=KEPT, response=None),
    KeepColumns(kept=torch.zeros(5, dtype=torch.bool), response=None),
    Dense(matrix=drawn(5, 5)),
    Dense(matrix=drawn(5)),
    SymmetricForm(matrix=drawn(5, 5)),
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transform_gives_a_new_tensor_of_the_type_of_the_rows_and_maps_each_by_itself(transform, dtype):
    rows = torch.randn(4, 5, dtype=dtype)
    before = rows.clone()
    found = transform(rows)
    assert found.dtype == dtype and torch.equal(rows, before)
    assert found.data_ptr() != rows.data_ptr()
    torch.testing.assert_close(torch.cat([transform(rows[:1]), transform(rows[1:])]), found, rtol=1e-5, atol=1e-6)
    assert transform(rows[:0]).shape == (0, found.shape[1])
