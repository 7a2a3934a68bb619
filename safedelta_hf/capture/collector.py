"""Sums the moments of all layers while a model runs."""

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.capture.layers import Layer, NormProbe
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.core.moment import InputMoment, add_outer_, add_squares_
from safedelta_hf.errors import CaptureError, NumericalError
from safedelta_hf.records import Role, Use


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
        self._batch = 1

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Hook every layer, and unhook all of them however the block ends.

        Yields:
            Nothing.
        """
        with ExitStack() as hooks:
            for layer in self._layers:
                hook = self._norm_hook(layer) if layer.role is Role.SCALE else self._input_hook(layer)
                hooks.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def start_batch(self, size: int) -> None:
        """Forget which tensors were read: identities hold within one forward pass only.

        Args:
            size: Sequences in the batch.
        """
        self._readings.clear()
        self._batch = size

    def moments(self, sequences: int) -> dict[str, InputMoment]:
        """The finished moments.

        Args:
            sequences: Number of sequences that were read.

        Returns:
            Moments by key, in the order in which the layers were first reached.

        Raises:
            CaptureError: A layer read its leader's input a different number of times.
            NumericalError: The inputs of a layer held NaN or Inf.
        """
        for follower, leader in self._leaders.items():
            if self._tokens[follower] != self._tokens[leader]:
                raise CaptureError(_unshared(follower, leader))
        for key, total in self._totals.items():
            if not torch.isfinite(total).all():
                raise NumericalError(
                    f"{key}: NaN or Inf in the inputs of this layer while the safety data was read; "
                    "check the base model, or load it in float32 or bfloat16"
                )
        return {
            key: InputMoment(total=self._storage.settle(total), sequences=sequences, tokens=self._tokens[key])
            for key, total in self._totals.items()
        }

    def uses(self) -> tuple[list[Use], dict[str, str]]:
        """How each parameter was used, and why others were not.

        Returns:
            The uses in layer order, and the reason by parameter name for layers that were never called or refused.
        """
        uses: dict[Use, None] = {}
        missing: dict[str, str] = dict(self._refused)
        for layer in self._layers:
            for parameter, role in ((layer.weight, layer.role), (layer.bias, Role.BIAS)):
                if parameter is None:
                    continue
                name = self._names[parameter]
                key = self._key(name, role)
                if self._tokens[key]:
                    uses[Use(parameter=name, role=role, moment=self._leaders.get(key, key))] = None
                else:
                    missing.setdefault(name, f"the safety data never reached its {type(layer.module).__name__}")
        return list(uses), missing

    def _key(self, parameter: str, role: Role) -> str:
        return f"{parameter}:{role}" if role is Role.EMBEDDING else parameter

    def _input_hook(self, layer: Layer) -> Any:  # noqa: ANN401
        key = self._key(self._names[layer.weight], layer.role)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:  # noqa: ANN401
            inputs = args[0] if args else next(iter(kwargs.values()))
            if layer.role is Role.EMBEDDING:
                self._count(key, inputs, layer.weight)
            else:
                self._read(key, inputs)
                self._add_bias(layer, inputs[..., 0].numel() * self._copies(inputs))

        return hook

    def _norm_hook(self, layer: Layer) -> Any:  # noqa: ANN401
        probe = NormProbe(layer.module)
        key = self._key(self._names[layer.weight], layer.role)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:  # noqa: ANN401
            if key in self._refused:
                return
            inputs = args[0] if args else next(iter(kwargs.values()))
            try:
                normalised = probe.normalised(inputs, outputs).flatten(0, -2)
            except CaptureError as error:
                reason = f"{type(layer.module).__name__}: {error}"
                own = (parameter for parameter in (layer.weight, layer.bias) if parameter is not None)
                self._refused.update({self._names[parameter]: reason for parameter in own})
                return
            add_squares_(self._total(key, (normalised.shape[-1],), normalised.device), normalised)
            self._tokens[key] += len(normalised)
            self._add_bias(layer, len(normalised))

        return hook

    def _read(self, key: str, inputs: Tensor) -> None:
        if self._is_shared(key, inputs):
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        copies = self._copies(inputs)
        add_outer_(self._total(key, (rows.shape[1], rows.shape[1]), rows.device), rows * copies**0.5)
        self._tokens[key] += len(rows) * copies

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
        size = inputs[..., 0].numel() * self._copies(inputs)
        leader = reading.leader
        is_follower = self._leaders.get(key) == leader and reading.calls[key] <= reading.calls[leader]
        is_new = leader != key and key not in self._tokens and self._tokens[leader] == size
        if is_follower or is_new:
            self._leaders[key] = leader
            self._tokens[key] += size
            return True
        if key in self._leaders:
            raise CaptureError(_unshared(key, self._leaders[key]))
        return False

    def _count(self, key: str, token_ids: Tensor, weight: Tensor) -> None:
        copies = self._batch if token_ids.ndim == 1 else self._copies(token_ids)
        counts = torch.bincount(token_ids.flatten(), minlength=len(weight)).to(torch.float32) * copies
        total = self._total(key, (len(weight),), counts.device)
        total.add_(counts.to(total.device))
        self._tokens[key] += token_ids.numel() * copies

    def _copies(self, inputs: Tensor) -> int:
        # A broadcast input, as of position embeddings, stands for every sequence of the batch.
        return self._batch if inputs.ndim > 1 and inputs.shape[0] == 1 else 1

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
    return (
        f"{follower}: it read the same tensor as {leader} at first, and later did not; "
        "collect the profile with share_moments=False"
    )
