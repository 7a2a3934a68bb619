"""Operations that use the entries of a weight one by one: scales, sums, lookups, and maps of the weight alone."""

from typing import Any

import torch
from torch import Tensor

from safedelta_hf.capture.reader import Arguments, Handler, OperationReader
from safedelta_hf.capture.views import ParameterView

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
    return given["bias"] is None or added(see, given["bias"], result[0])


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
    return given["bias"] is None or added(see, given["bias"], result[0], dimension=1)


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
        return see.is_data(constant) and added(see, given[own], result)
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
        added(see, tensor, tensor)
    return True


def added(see: OperationReader, value: object, result: Tensor, dimension: int | None = None) -> bool:
    """Tell of a sum, if what is added is a weight.

    Args:
        see: Who is told.
        value: What is added.
        result: The sum.
        dimension: Where a weight of one dimension lies in the result; None if it broadcasts to it as usual.

    Returns:
        True: any weight may be added.
    """
    weight = see.view(value)
    if weight is not None:
        if dimension is None:
            weight = weight.broadcast(result.shape)
        see.offset(weight, result.numel() // weight.count)
    return True


def _scaled(see: OperationReader, weight: ParameterView, factor: Tensor) -> None:
    """Tell of an elementwise product, with the factor's squares summed over all that one entry of the weight meets."""
    weight = weight.broadcast(factor.shape)
    _, repeated = weight.split()
    squares = factor.to(torch.float32).square()
    repetitions = factor.numel() // weight.count
    see.scale(weight, squares.sum(repeated, keepdim=True) if repeated else squares, repetitions)


ELEMENTWISE: dict[Any, Handler] = {
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
}
"""What each of them does with its weights."""
