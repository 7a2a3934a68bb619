"""How each primitive operation uses a weight: the few forms to which everything that a model computes comes down.

Modules, einsum, parametrisations and fused layers all end in these, so a weight is seen wherever it is multiplied.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - it registers an operation
from torch import Tensor, nn

from safedelta_hf.capture.reader import Arguments, Handler, OperationReader
from safedelta_hf.capture.views import ParameterView
from safedelta_hf.records.uses import Role

aten = torch.ops.aten


def _embedding(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    weight = see.view(given["weight"])
    if weight is not None:
        see.lookup(weight, given["indices"])
    return weight is not None


def _index_select(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    weight = see.view(given["self"])
    if weight is None or given["dim"] != 0 or len(weight.shape) != 2:
        return False
    see.lookup(weight, given["index"])
    return True


def _index(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    weight, indices = see.view(given["self"]), given["indices"]
    if weight is None or len(weight.shape) != 2 or len(indices) != 1 or indices[0].dtype is not torch.int64:
        return False
    see.lookup(weight, indices[0])
    return True


def _layer_norm(see: OperationReader, given: Arguments, result: tuple[Tensor, Tensor, Tensor]) -> bool:
    inputs, weight = given["input"], see.view(given["weight"])
    if weight is not None:
        normalised = (inputs.float() - result[1].float()) * result[2].float()
        _scaled(see, weight, normalised)
    return given["bias"] is None or _added(see, given["bias"], result[0])


def _rms_norm(see: OperationReader, given: Arguments, result: tuple[Tensor, Tensor]) -> bool:
    weight = see.view(given["weight"])
    if weight is not None:
        _scaled(see, weight, given["input"].float() * result[1].float())
    return weight is not None


def _group_norm(see: OperationReader, given: Arguments, result: tuple[Tensor, Tensor, Tensor]) -> bool:
    inputs, weight = given["input"], see.view(given["weight"])
    if weight is not None:
        grouped = inputs.float().reshape(given["N"], given["group"], -1)
        normalised = ((grouped - result[1].float()[..., None]) * result[2].float()[..., None]).reshape(inputs.shape)
        _scaled(see, weight, normalised.movedim(1, -1))
    return given["bias"] is None or _added(see, given["bias"], result[0], dimension=1)


def _mul(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    for own, other in (("self", "other"), ("other", "self")):
        weight, factor = see.view(given[own]), given[other]
        if weight is None:
            continue
        if other == "self":
            factor = given.get("before", factor)
        if not isinstance(factor, Tensor) or (see.is_constant(factor) and factor.numel() == 1):
            see.derive(result, weight.broadcast(result.shape), float(factor))
            return True
        if see.is_constant(factor) and weight.shape == tuple(result.shape):
            see.derive(result, weight, factor.broadcast_to(result.shape))
            return True
        if not see.is_data(given[other]):
            return False
        _scaled(see, weight.broadcast(result.shape), factor.broadcast_to(result.shape))
        return True
    return True


def _div(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    weight, divisor = see.view(given["self"]), given["other"]
    if weight is None:
        return False
    if not isinstance(divisor, Tensor):
        see.derive(result, weight, 1 / float(divisor))
        return True
    if not see.is_data(divisor):
        return False
    _scaled(see, weight.broadcast(result.shape), 1 / divisor.broadcast_to(result.shape))
    return True


def _add(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    return _sum(see, given, result, (1.0, 1.0))


def _sub(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    return _sum(see, given, result, (1.0, -1.0))


def _rsub(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    return _sum(see, given, result, (-1.0, 1.0))


def _sum(see: OperationReader, given: Arguments, result: Tensor, signs: tuple[float, float]) -> bool:
    if given.get("alpha", 1) != 1:
        return False
    for own, other, sign in (("self", "other", signs[0]), ("other", "self", signs[1])):
        weight, constant = see.view(given[own]), given[other]
        if weight is None:
            continue
        if not isinstance(constant, Tensor) or see.is_constant(constant):
            see.derive(result, weight.broadcast(result.shape), sign)
            return True
        return see.is_data(constant) and _added(see, given[own], result)
    return True


def _neg(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    return _copy(see, given, result, -1.0)


def _copy(see: OperationReader, given: Arguments, result: Tensor, factor: float = 1.0) -> bool:
    weight = see.view(given["self"])
    if weight is not None:
        see.derive(result, weight, factor)
    return weight is not None


def _lerp(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    weight = see.view(given["weight"])
    if weight is None or see.view(given["self"]) is not None or see.view(given["end"]) is not None:
        return False
    _scaled(see, weight.broadcast(result.shape), (given["end"] - given["self"]).broadcast_to(result.shape))
    return True


def _cat(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    if not any(see.is_data(tensor) for tensor in given["tensors"]):
        return False
    for tensor in given["tensors"]:
        _added(see, tensor, tensor)
    return True


def _added(see: OperationReader, value: object, result: Tensor, dimension: int | None = None) -> bool:
    # `dimension` is where a weight of one dimension lies in the result; None if it broadcasts to it as usual.
    weight = see.view(value)
    if weight is not None:
        if dimension is None:
            weight = weight.broadcast(result.shape)
        see.offset(weight, result.numel() // weight.count)
    return True  # any weight may be added


def _scaled(see: OperationReader, weight: ParameterView, factor: Tensor) -> None:
    """Tell of an elementwise product, with the factor's squares summed over all that one entry of the weight meets."""
    weight = weight.broadcast(factor.shape)
    _, repeated = weight.split()
    squares = factor.to(torch.float32).square()
    repetitions = factor.numel() // weight.count
    see.scale(weight, squares.sum(repeated, keepdim=True) if repeated else squares, repetitions)


def _patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    # Unfolds the inputs of a convolution, [batch, channels, *sizes] or without the batch, of any number of dimensions.
    # Returns [groups, outputs, channels / groups * positions], in the order of the flattened kernel.
    spatial = len(kernel)
    if inputs.ndim == spatial + 1:
        inputs = inputs[None]
    padded = nn.functional.pad(inputs, [side for size in reversed(padding) for side in (size, size)])
    for number, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        padded = padded.unfold(2 + number, spread * (size - 1) + 1, step)[..., ::spread]
    # [batch, channels, *outputs, *positions]
    batch, channels = padded.shape[:2]
    split = padded.reshape(batch, groups, channels // groups, *padded.shape[2:])
    places = range(3, 3 + spatial)
    ordered = split.permute(1, 0, *places, 2, *range(3 + spatial, 3 + 2 * spatial))
    return ordered.reshape(groups, -1, ordered.shape[2 + spatial :].numel())


def _matrix_product(see: OperationReader, left: Any, right: Any) -> bool:  # noqa: ANN401
    # Either may be the weight: [tokens, in] @ [in, out], or [out, in] @ [in, tokens].
    if see.is_data(left):
        return _product(see, right.T, left)
    return see.is_data(right) and _product(see, left, right.T)


def _product(see: OperationReader, matrix: Tensor, inputs: Tensor) -> bool:
    weight = see.view(matrix)
    if weight is not None:
        see.product(weight, inputs)
        return True
    found = see.sorted_view(matrix)
    if found is not None:
        see.product(found[0], inputs[:, found[1][1]])
    return True


def _mm(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    return _matrix_product(see, given["self"], given["mat2"])


def _addmm(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    if (given["alpha"], given["beta"]) != (1, 1):
        return False
    return _added(see, given["self"], result) and _matrix_product(see, given["mat1"], given["mat2"])


def _linear(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    inputs, weight = given["input"], see.view(given["weight"])
    if weight is None or not see.is_data(inputs):
        return False
    see.product(weight, inputs.reshape(-1, inputs.shape[-1]))
    return given.get("bias") is None or _added(see, given["bias"], result)


def _mv(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    matrix, vector = see.view(given["self"]), see.view(given["vec"])
    if matrix is not None and see.is_data(given["vec"]):
        see.product(matrix, given["vec"][None])
        return True
    if vector is not None and see.is_data(given["self"]):
        row = replace(vector, shape=(1, *vector.shape), strides=(0, *vector.strides))
        see.product(row, given["self"])
        return True
    return False


def _bmm(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    return _batched(see, given["self"], given["mat2"])


def _baddbmm(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    if (given["alpha"], given["beta"]) != (1, 1):
        return False
    return _added(see, given["self"], result) and _batched(see, given["batch1"], given["batch2"])


def _batched(see: OperationReader, left: Tensor, right: Tensor) -> bool:
    return all([_matrix_product(see, *pair) for pair in zip(left, right, strict=True)])


def _grouped_mm(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    return _grouped(see, given["self"], given["mat2"], given["offs"])


def _grouped_mm_fallback(see: OperationReader, given: Arguments, _: Any) -> bool:  # noqa: ANN401
    return _grouped(see, given["input"], given["weight"], given["offs"])


def _grouped(see: OperationReader, inputs: Tensor, matrices: Tensor, ends: Tensor | None) -> bool:
    weight = see.view(matrices)
    if weight is None or ends is None or not see.is_data(inputs) or inputs.ndim != 2 or len(weight.shape) != 3:
        return False
    groups, columns, rows = weight.shape
    turned = replace(weight, shape=(groups, rows, columns), strides=tuple(weight.strides[n] for n in (0, 2, 1)))
    # Inputs beyond the last end are of no group.
    for index, own in enumerate(inputs.tensor_split(ends.to("cpu", torch.int64))[:-1]):
        see.product(turned.select(0, index), own)
    return True


def _convolution(see: OperationReader, given: Arguments, result: Tensor) -> bool:
    weight, groups = see.view(given["weight"]), given["groups"]
    covered = given["bias"] is None or _added(see, given["bias"], result, dimension=1)
    if weight is None or not see.is_data(given["input"]):
        return weight is None and covered
    if given["transposed"] or not weight.is_plain:
        return False
    # [groups, tokens, in * positions]: each group of outputs reads channels of its own.
    read = _patches(given["input"], weight.shape[2:], given["stride"], given["padding"], given["dilation"], groups)
    if weight.shape[1] == 1 and groups > 1:
        # One channel for each output. No matrix for each channel, but the diagonals of all of them. For a positive
        # semi-definite H of k columns, H <= k diag(H): the loss is bounded from above.
        squares = read.float().square().sum(1) * read.shape[-1]
        see.scale(weight, squares.repeat_interleave(weight.shape[0] // groups, 0).reshape(weight.shape), read.shape[1])
        return covered
    rows, columns = weight.shape[0] // groups, read.shape[-1]
    for group in range(groups):
        start = weight.start + group * rows * columns
        piece = replace(weight, start=start, shape=(rows, columns), strides=(columns, 1))
        see.product(piece, read[group], Role.CONVOLUTION)
    return covered


def slopes_of(func: Any, given: Arguments) -> Tensor | None:  # noqa: ANN401
    """Derivative of an elementwise function of one tensor, by central differences in float64.

    Args:
        func: Any operation.
        given: Its arguments by name.

    Returns:
        The derivative at each entry, or None if it is no such function.
    """
    tensors = [name for name, value in given.items() if isinstance(value, Tensor)]
    if torch.Tag.pointwise not in getattr(func, "tags", ()) or func._schema.is_mutable or len(tensors) != 1:
        return None
    value = given[tensors[0]].double()
    step = 1e-5 * value.abs().clamp_min(1.0)
    above, below = (func(**{**given, tensors[0]: value + sign * step}) for sign in (1, -1))
    slopes: Tensor = (above - below) / (2 * step)
    return slopes


def _nothing(see: OperationReader, given: Arguments, result: object) -> bool:
    return True


HANDLERS: dict[Any, Handler] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
    aten.mv.default: _mv,
    aten.linear.default: _linear,
    aten._grouped_mm.default: _grouped_mm,
    torch.ops.transformers.grouped_mm_fallback.default: _grouped_mm_fallback,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.native_layer_norm.default: _layer_norm,
    aten._fused_rms_norm.default: _rms_norm,
    aten.native_group_norm.default: _group_norm,
    aten.mul.Tensor: _mul,
    aten.mul_.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add,
    aten.add.Scalar: _add,
    aten.sub.Tensor: _sub,
    aten.sub_.Tensor: _sub,
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.neg.default: _neg,
    aten.clone.default: _copy,
    aten._to_copy.default: _copy,
    aten.lerp.Tensor: _lerp,
    aten.cat.default: _cat,
    aten.empty_like.default: _nothing,
    aten.zeros_like.default: _nothing,
    aten.ones_like.default: _nothing,
    aten.new_empty.default: _nothing,
    aten.new_zeros.default: _nothing,
    aten.new_ones.default: _nothing,
    aten._local_scalar_dense.default: _nothing,
}
"""What each operation does with its weights. One that is not here covers none, and is named in the report."""
