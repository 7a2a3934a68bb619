import pytest
import torch

from safedelta_hf.adjust.plan import unreached
from safedelta_hf.core.rounding import round_columns
from safedelta_hf.core.transform import Dense
from safedelta_hf.deltas.dense import DenseDelta, DenseMatrix
from safedelta_hf.errors import NumericalError
from safedelta_hf.records.uses import MatrixView, Role, Use

SHAPES = {
    Role.LINEAR: (5, 3),
    Role.HEAD: (5, 3),
    Role.CONV1D: (3, 5),
    Role.EMBEDDING: (3, 5),
    Role.SCALE: (3,),
    Role.BIAS: (5,),
    Role.OFFSET: (2, 3),
    Role.CONVOLUTION: (5, 3, 2),
}


def view(delta, role, part=None):
    return DenseMatrix(delta, part or role.view(delta.shape))


def as_matrix(delta, role):
    """Oracle: the [rows, columns] matrix of each role, written out."""
    if role in (Role.LINEAR, Role.HEAD):
        return delta
    if role in (Role.CONV1D, Role.EMBEDDING):
        return delta.T
    if role is Role.CONVOLUTION:
        return delta.flatten(1)
    return delta.flatten()[None, :] if role in (Role.SCALE, Role.OFFSET) else delta[:, None]


@pytest.mark.parametrize("role", list(Role))
def test_each_role_is_laid_out_with_one_column_for_each_input(role):
    delta = torch.randn(SHAPES[role])
    seen, matrix = view(delta, role), as_matrix(delta, role)
    assert seen.rows == len(matrix)
    torch.testing.assert_close(seen.column_energy(), matrix.square().sum(0))


@pytest.mark.parametrize("role", list(Role))
def test_a_transform_multiplies_from_the_right_and_keeps_the_shape(role):
    delta = torch.randn(SHAPES[role])
    matrix = as_matrix(delta, role)
    transform = Dense(matrix=torch.randn(matrix.shape[1], matrix.shape[1]))
    expected = matrix @ transform.matrix
    inner = view(delta, role).inner(transform)
    assert inner == pytest.approx(float((matrix * expected).sum()), rel=1e-4, abs=1e-5)
    result = view(delta, role).transformed(transform)
    assert result.shape == delta.shape
    torch.testing.assert_close(as_matrix(result, role), expected)
    view(delta, role).replace(transform)
    torch.testing.assert_close(delta, result)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_part_is_transformed_and_nothing_else(is_transposed):
    delta = torch.randn(4, 5, 3)
    before = delta.clone()
    if is_transposed:
        part = MatrixView(start=2 * 15, rows=3, columns=5, row_stride=1, column_stride=3)
    else:
        part = MatrixView(start=2 * 15, rows=5, columns=3, row_stride=3, column_stride=1)
    matrix = before[2].T if is_transposed else before[2]
    transform = Dense(matrix=torch.randn(part.columns, part.columns))
    result = view(delta, Role.LINEAR, part).transformed(transform)
    assert torch.equal(delta, before)
    view(delta, Role.LINEAR, part).replace(transform)
    torch.testing.assert_close(delta, result)
    torch.testing.assert_close(delta[2].T if is_transposed else delta[2], matrix @ transform.matrix)
    assert torch.equal(delta[[0, 1, 3]], before[[0, 1, 3]])


def test_parts_that_no_use_covers_are_counted():
    uses = tuple(
        Use(
            parameter="weight",
            role=Role.LINEAR,
            moment=str(index),
            view=MatrixView(start=15 * index, rows=5, columns=3, row_stride=3, column_stride=1),
            shape=(4, 5, 3),
        )
        for index in (0, 2)
    )
    assert "never reached 2 of its 4 parts" in unreached((4, 5, 3), uses)
    assert not unreached((2, 5, 3), uses)
    assert not unreached(
        (4, 5, 3),
        (Use(parameter="weight", role=Role.SCALE, moment="all", view=Role.SCALE.view((4, 5, 3)), shape=(4, 5, 3)),),
    )


def test_a_merge_leaves_parts_that_no_use_covers_as_tuned():
    base, tuned, merged = torch.randn(3, 5, 4), torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    part = MatrixView(start=20, rows=4, columns=5, row_stride=1, column_stride=4)
    use = Use(parameter="weight", role=Role.LINEAR, moment="expert", view=part, shape=(3, 5, 4))
    delta = DenseDelta(tuned, base)
    weight = delta.adjusted_to(merged, (use,)).weight()
    assert torch.equal(weight[[0, 2]], tuned[[0, 2]])
    torch.testing.assert_close(weight[1], base[1] + merged[1])
    assert torch.equal(delta.weight(), tuned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_bit_identical_to_tuned_and_what_is_dropped_to_base(dtype):
    base = torch.randn(40, 40).to(dtype)
    tuned = (base.float() + 1e-3 * torch.randn(40, 40)).to(dtype)
    delta = tuned.float() - base.float()
    kept = torch.arange(40) % 2 == 0
    result = DenseDelta(tuned, base).keeping(torch.where(kept, delta, 0.0)).weight()
    assert result.dtype == dtype
    assert torch.equal(result[:, kept], tuned[:, kept])
    assert torch.equal(result[:, ~kept], base[:, ~kept])


def test_adjusting_a_delta_leaves_the_one_that_it_was_made_of():
    base, tuned = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    uses = [
        Use(
            parameter="w",
            role=Role.LINEAR,
            moment="w",
            view=MatrixView.contiguous(4, 5, start=20 * number),
            shape=(3, 4, 5),
        )
        for number in range(3)
    ]
    delta = DenseDelta(tuned, base)
    once = delta.transformed(uses[1], Dense(matrix=torch.full((5,), 0.5)))
    assert torch.equal(once.values[1], 0.5 * (tuned - base)[1])
    twice = once.transformed(uses[2], Dense(matrix=torch.zeros(5)))
    for changed in (twice, delta.zero(), delta.keeping(torch.ones(3, 4, 5))):
        expected = (tuned.double() - base.double() - changed.values.double()).square().sum()
        torch.testing.assert_close(changed.lost_energy, float(expected), rtol=1e-5, atol=0.0)
        assert changed.tuned_energy == delta.tuned_energy and not changed.is_whole
    assert torch.equal(twice.weight()[0], tuned[0]) and torch.equal(twice.weight()[2], base[2])
    assert torch.equal(delta.values, tuned - base) and delta.lost_energy == 0 and delta.is_whole
    assert torch.equal(delta.weight(), tuned) and torch.equal(delta.zero().weight(), base) and delta.zero().is_zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_rounded_delta_is_what_its_weight_carries(dtype):
    base, tuned = torch.randn(6, 5).to(dtype), torch.randn(6, 5).to(dtype)
    half = DenseDelta(tuned, base).keeping((tuned - base).float() / 3)
    rounded = half.rounded()
    assert rounded.weight().dtype == dtype
    assert torch.equal(rounded.values, rounded.weight().float() - base.float())
    assert torch.equal(rounded.rounded().weight(), rounded.weight())
    assert DenseDelta(tuned, base).rounded().is_whole and half.zero().rounded().is_zero


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [0, 2])
def test_the_errors_of_rounding_stay_in_the_matrix_that_a_use_reads(number, dtype):
    base, tuned = torch.randn(3, 4, 5).to(dtype), torch.randn(3, 4, 5).to(dtype)
    view = MatrixView.contiguous(4, 5, start=20 * number)
    use = Use(parameter="w", role=Role.LINEAR, moment="w", view=view, shape=(3, 4, 5))
    factor = torch.linalg.cholesky(torch.eye(5) + torch.ones(5, 5)).T.contiguous()
    half = DenseDelta(tuned, base).keeping((tuned.float() - base.float()) / 3)
    fed, nearest = half.rounded_along([(use, factor)]).rounded().weight(), half.rounded().weight()
    others = [one for one in range(3) if one != number]
    assert torch.equal(fed[others], nearest[others]) and not torch.equal(fed[number], nearest[number])
    assert torch.equal(fed[number], round_columns(half.wanted()[number], dtype, factor))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e18, 1e25, 1e35])
def test_figures_of_a_delta_of_any_size_are_those_of_float64(scale):
    tuned, base = torch.randn(5, 3) * scale, torch.randn(5, 3) * scale
    use = Use(parameter="w", role=Role.LINEAR, moment="w", view=Role.LINEAR.view((5, 3)), shape=(5, 3))
    hessian = torch.randn(7, 3)
    hessian = hessian.T @ hessian
    delta = DenseDelta(tuned, base)
    half = delta.transformed(use, Dense(matrix=torch.full((3,), 0.5)))
    exact = (tuned - base).double()
    assert delta.tuned_energy == pytest.approx(float(exact.square().sum()), rel=1e-5, abs=0)
    assert half.lost_energy == pytest.approx(float(exact.square().sum()) / 4, rel=1e-5, abs=0)
    expected = float(torch.trace(exact @ hessian.double() @ exact.T))
    assert delta.matrix(use).inner(Dense(matrix=hessian)) == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_delta_beyond_float32_is_a_named_error(dtype):
    largest = torch.full((2,), 3e38, dtype=dtype)
    with pytest.raises(NumericalError, match="beyond float32"):
        DenseDelta(largest, -largest)


def test_nothing_is_no_figure():
    zero = DenseDelta(torch.ones(2, 2), torch.ones(2, 2))
    assert zero.tuned_energy == zero.lost_energy == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_errors_of_rounding_are_fed_on_in_all_parts_as_in_each_alone(dtype):
    base, tuned = torch.randn(3, 4, 5).to(dtype), torch.randn(3, 4, 5).to(dtype)
    views = [MatrixView.contiguous(4, 5, start=20 * number) for number in (0, 2)]
    uses = [Use(parameter="w", role=Role.LINEAR, moment="w", view=view, shape=(3, 4, 5)) for view in views]
    factor = torch.linalg.cholesky(torch.eye(5) + torch.ones(5, 5)).T.contiguous()
    half = DenseDelta(tuned, base).keeping((tuned.float() - base.float()) / 3)
    before = half.values.clone()
    together = half.rounded_along([(use, factor * (1 + n)) for n, use in enumerate(uses)]).rounded().weight()
    for number, (n, use) in zip((0, 2), enumerate(uses), strict=True):
        alone = half.rounded_along([(use, factor * (1 + n))]).rounded().weight()
        assert torch.equal(together[number], alone[number])
    assert torch.equal(together[1], half.rounded().weight()[1]) and torch.equal(half.values, before)
