"""Sums the moments of all layers while a model runs."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from safedelta_hf.capture.layers import Layer, LinearProbe, NormProbe, first_argument
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.core.moment import InputMoment, add_outer_, add_squares_
from safedelta_hf.errors import CaptureError, NumericalError
from safedelta_hf.records import Role, Use

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class _Unshared(CaptureError):
    """Layers that shared their input at first later did not; no reason to leave one out, but to stop."""


@dataclass
class _Reading:
    """A tensor that layers are reading, and how often each has read it."""

    tensor: weakref.ref[Tensor]
    version: int
    leader: str
    calls: Counter[str] = field(default_factory=Counter)


class MomentCollector:
    """Moments of a set of layers, keyed by parameter name.

    Layers that read the very same tensor share the moment of the first of them, their leader.

    Args:
        layers: The layers to observe.
        names: Name by which each parameter is known, by identity; tied parameters have one.
        storage: Where the moments are held.
        share: Whether layers may share a moment.
    """

    def __init__(
        self, layers: Sequence[Layer], names: dict[nn.Parameter, str], storage: MomentStorage, *, share: bool
    ) -> None:
        self._layers = layers
        self._names = names
        self._storage = storage
        self._share = share
        self._totals: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._leaders: dict[str, str] = {}
        self._readings: dict[int, _Reading] = {}
        self._refused: dict[str, str] = {}
        self._batch, self._length = 1, 0

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Watch every layer, and stop watching all of them however the block ends.

        Yields:
            Nothing.
        """
        makers = {Role.SCALE: self._norm_hook, Role.EMBEDDING: None}
        with ExitStack() as hooks:
            for layer in self._layers:
                make = makers.get(layer.role, self._linear_hook)
                if make is not None:
                    hooks.callback(layer.module.register_forward_hook(make(layer), with_kwargs=True).remove)
            hooks.enter_context(_EmbeddingReads(self))
            yield

    def start_batch(self, size: int, length: int) -> None:
        """Forget which tensors were read: identities hold within one forward pass only.

        Args:
            size: Sequences in the batch.
            length: Tokens in each of them.
        """
        self._readings.clear()
        self._batch, self._length = size, length

    def count(self, weight: nn.Parameter, token_ids: Tensor) -> None:
        """Count how often each row of an embedding is looked up.

        Args:
            weight: The embedding, [tokens, features].
            token_ids: Rows that were looked up, any shape.
        """
        if weight not in self._names:
            return
        key = self._key(self._names[weight], Role.EMBEDDING)
        # Positions are looked up once for a whole batch, and stand for each of its sequences.
        copies = self._batch if token_ids.numel() == self._length else 1
        counts = torch.bincount(token_ids.flatten(), minlength=len(weight)).to(torch.float32) * copies
        total = self._total(key, (len(weight),), counts.device)
        total.add_(counts.to(total.device))
        self._tokens[key] += token_ids.numel() * copies

    def moments(self, sequences: int) -> dict[str, InputMoment]:
        """The finished moments.

        Args:
            sequences: Number of sequences that were read.

        Returns:
            Moments by key, in the order in which the layers were first reached; in host memory, mapped or not.

        Raises:
            _Unshared: A layer read its leader's input a different number of times; a `CaptureError`.
            NumericalError: The inputs of a layer held NaN or Inf.
        """
        for follower, leader in self._leaders.items():
            if self._tokens[follower] != self._tokens[leader]:
                raise _Unshared(_unshared(follower, leader))
        for key, total in self._totals.items():
            if not torch.isfinite(total).all():
                raise NumericalError(
                    f"{key}: NaN or Inf in the inputs of this layer while the safety data was read; "
                    "check the base model, or load it in float32 or bfloat16"
                )
        return {
            key: InputMoment(total=total.cpu(), sequences=sequences, tokens=self._tokens[key])
            for key, total in self._totals.items()
        }

    def uses(self) -> tuple[list[Use], dict[str, str]]:
        """How each parameter was used, and why others were not.

        Returns:
            The uses in layer order, and the reason by parameter name for layers that were never called or refused.
        """
        uses: dict[tuple[str, str], Use] = {}
        missing: dict[str, str] = dict(self._refused)
        for layer in self._layers:
            for parameter, role in ((layer.weight, layer.role), (layer.bias, Role.BIAS)):
                if parameter is None or self._names[parameter] in self._refused:
                    continue
                name = self._names[parameter]
                key = self._key(name, role)
                moment = self._leaders.get(key, key)
                if self._tokens[key]:
                    uses.setdefault((name, moment), Use(parameter=name, role=role, moment=moment))
                else:
                    missing.setdefault(name, f"the safety data never reached its {type(layer.module).__name__}")
        return list(uses.values()), missing

    def _key(self, parameter: str, role: Role) -> str:
        return f"{parameter}:{role}" if role is Role.EMBEDDING else parameter

    def _linear_hook(self, layer: Layer) -> Hook:
        probe = LinearProbe(layer)
        key = self._names[layer.weight]

        def observe(args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ANN401
            inputs = first_argument(args, kwargs)
            if not isinstance(inputs, Tensor):
                raise CaptureError("its input is not a tensor")
            probe.verify(inputs, outputs)
            self._read(key, inputs)
            self._add_bias(layer, inputs[..., 0].numel())

        return self._refusing(layer, observe)

    def _norm_hook(self, layer: Layer) -> Hook:
        probe = NormProbe(layer.module)
        key = self._names[layer.weight]

        def observe(args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ANN401
            normalised = probe.normalised(args, kwargs, outputs).flatten(0, -2)
            add_squares_(self._total(key, (normalised.shape[-1],), normalised.device), normalised)
            self._tokens[key] += len(normalised)
            self._add_bias(layer, len(normalised))

        return self._refusing(layer, observe)

    def _refusing(self, layer: Layer, observe: Callable[..., None]) -> Hook:
        # A layer that is not what it seems is left out, with the reason.
        own = [self._names[parameter] for parameter in (layer.weight, layer.bias) if parameter is not None]

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ANN401
            if own[0] in self._refused:
                return
            try:
                observe(args, kwargs, outputs)
            except _Unshared:
                raise
            except CaptureError as error:
                self._refused.update(dict.fromkeys(own, f"{type(layer.module).__name__}: {error}"))

        return hook

    def _read(self, key: str, inputs: Tensor) -> None:
        if self._is_shared(key, inputs):
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        add_outer_(self._total(key, (rows.shape[1], rows.shape[1]), rows.device), rows)
        self._tokens[key] += len(rows)

    def _is_shared(self, key: str, inputs: Tensor) -> bool:
        # A layer becomes the follower of the first that read this tensor if it was never reached before and the leader
        # only now; from then on both must always read the same tensors.
        if not self._share:
            return False
        reading = self._readings.get(id(inputs))
        if reading is None or reading.tensor() is not inputs or reading.version != inputs._version:
            reading = _Reading(weakref.ref(inputs), inputs._version, leader=key)
            self._readings[id(inputs)] = reading
        reading.calls[key] += 1
        size = inputs[..., 0].numel()
        leader = reading.leader
        is_follower = self._leaders.get(key) == leader and reading.calls[key] <= reading.calls[leader]
        is_new = leader != key and key not in self._tokens and self._tokens[leader] == size
        if is_follower or is_new:
            self._leaders[key] = leader
            self._tokens[key] += size
            return True
        if key in self._leaders:
            raise _Unshared(_unshared(key, self._leaders[key]))
        return False

    def _add_bias(self, layer: Layer, tokens: int) -> None:
        if layer.bias is not None:
            key = self._names[layer.bias]
            self._total(key, (1,), layer.bias.device).add_(tokens)
            self._tokens[key] += tokens

    def _total(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if key not in self._totals:
            self._totals[key] = self._storage.allocate(shape, device)
        return self._totals[key]


def _unshared(follower: str, leader: str) -> str:
    return f"{follower}: it read the same tensor as {leader} at first, and later did not; pass share_moments=False"


class _EmbeddingReads(TorchFunctionMode):
    """Sees every lookup in an embedding, also by subclasses whose `forward` is not given row numbers."""

    def __init__(self, collector: MomentCollector) -> None:
        super().__init__()
        self._collector = collector

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            bound = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            self._collector.count(bound["weight"], bound["input"])
        return func(*args, **kwargs)
