"""Safety-Aware Probing: each step sees hidden states that were moved to where a harmful step would cost usefulness.

SAP (arXiv 2505.16737), Algorithm 1. `W` are the trained parameters, `v_j` an offset that is added to what decoder layer
`j` returns, `V` all of them, `L_use` the Trainer's own loss:

    dW     = eps |W| g / |g|                               g = grad_W L_safe(W)
    V_safe = beta (a - b)                                  a = grad_V L_use(W + dW, V), b = grad_V L_use(W, V), at V = 0
    W     <- W - alpha grad_W L_use(W, V_safe)
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from safedelta_hf.data.batches import require_fit
from safedelta_hf.data.dataset import Source
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ArchitectureError, ConfigurationError, NumericalError
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.modules.evaluating import in_own_precision, random_state_kept
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.rules.rule import require_number
from safedelta_hf.training.preferences import LOSSES, PreferencePair, draw, log_likelihoods, read_pairs

MIDDLE: Final = (11 / 32, 20 / 32)
"""The first and the last of the layers that the paper moves, as shares of all: 11 to 20 of 32."""

ROUNDING_STEPS: Final = 10
"""How many rounding steps of the coarsest weights the harmful move has to be long, relative to the trained ones."""

Offsets = dict[nn.Module, Tensor]
"""What is added to the hidden states that a decoder layer returns, [hidden], for every token."""


@dataclass(frozen=True, kw_only=True)
class SafetyProbeConfig:
    """How steps are probed.

    Args:
        pairs: Rows of `prompt`, `chosen` (a safe reply) and `rejected` (a harmful one), in TRL's preference format,
            conversational or not; a Dataset, a list of dicts, or the path of a JSON-lines file.
        layers: Numbers of the decoder layers whose hidden states are moved, from 0; "middle" for the paper's block, 11
            to 20 of 32.
        beta: How far they are moved, at least 0: with `normalise="rms"` the root mean square of each layer's offset,
            else the step size of the formula. 0 is plain training.
        epsilon: Norm of the harmful move over the norm of the trained parameters, at least 0. 0 is plain training.
        normalise: "rms" sets the size of each layer's offset to `beta`, as the first step of Adam in the authors' code
            does; "none" is the paper's formula.
        loss: What is low where safe replies are likelier than harmful ones: "contrastive" or "difference".
        temperature: What log-likelihoods are divided by in it, positive.
        every_n_steps: Which optimiser steps are probed; between them stand plain ones.
        batch_size: Pairs read at each step, by all processes together.
        max_length: Pairs are cut to this many tokens; None leaves them whole.
        seed: Of the order in which pairs are read.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    pairs: Source
    layers: Literal["middle"] | Sequence[int] = "middle"
    beta: float = 0.05
    epsilon: float = 2e-5
    normalise: Literal["rms", "none"] = "rms"
    loss: Literal["contrastive", "difference"] = "contrastive"
    temperature: float = 1.0
    every_n_steps: int = 1
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for field in ("beta", "epsilon"):
            require_number(owner, field, getattr(self, field), "at least 0 and finite", lambda v: 0 <= v < math.inf)
        require_number(owner, "temperature", self.temperature, "positive and finite", lambda v: 0 < v < math.inf)
        for field in ("every_n_steps", "batch_size", "max_length"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                if field != "max_length" or value is not None:
                    raise ConfigurationError(f"{owner}: {field}={value!r} must be a whole number of at least 1")
        for field, allowed in (("normalise", ("rms", "none")), ("loss", tuple(LOSSES))):
            if getattr(self, field) not in allowed:
                raise ConfigurationError(f"{owner}: {field}={getattr(self, field)!r} is not one of {allowed}")
        if self.layers != "middle" and (isinstance(self.layers, str) or not self.layers):
            raise ConfigurationError(f'{owner}: layers={self.layers!r} is neither "middle" nor numbers of layers')

    @property
    def is_plain(self) -> bool:
        """Whether nothing is ever moved."""
        return self.beta == 0 or self.epsilon == 0


T = TypeVar("T", bound=Trainer)


def with_safety_probe(trainer_class: type[T]) -> type[T]:
    """A Trainer whose steps are probed; nothing but `training_step` differs.

    Args:
        trainer_class: `transformers.Trainer`, or a subclass of it such as TRL's `SFTTrainer`.

    Returns:
        A subclass that takes one more keyword, `probe`, a `SafetyProbeConfig`.

    Raises:
        ConfigurationError: It is no class of Trainers.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise ConfigurationError(f"with_safety_probe: {trainer_class!r} is no subclass of transformers.Trainer")

    class SafetyProbeTrainer(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, probe: SafetyProbeConfig, **kwargs: Any) -> None:  # noqa: ANN401
            super().__init__(*args, **kwargs)
            self.safety_probe = SafetyProbe(probe, self.processing_class)

        def training_step(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor:
            offsets = self.safety_probe.offsets(self, model, inputs, num_items_in_batch)
            with _added(offsets):  # until the backward pass is done, which may run layers again
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return loss

    SafetyProbeTrainer.__name__ = SafetyProbeTrainer.__qualname__ = f"SafetyProbe{trainer_class.__name__}"
    return SafetyProbeTrainer


class SafetyProbe:
    """Finds the offsets of a training step.

    Args:
        config: How.
        processing_class: Tokenizer or processor for the pairs.
    """

    def __init__(self, config: SafetyProbeConfig, processing_class: ProcessingClass | None) -> None:
        if not isinstance(config, SafetyProbeConfig):
            raise ConfigurationError(f"probe: expected a SafetyProbeConfig, got {type(config).__name__}")
        self.config = config
        self._pairs = read_pairs(config.pairs, processing_class, config.max_length)
        self._model: ShardedModel | None = None
        self._layers: list[nn.Module] = []
        self._step, self._micro = -1, 0

    def offsets(
        self, trainer: Trainer, model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int | None
    ) -> Offsets:
        """Find what is to be added to hidden states in a step, and leave everything else as it was.

        Args:
            trainer: The Trainer whose step it is.
            model: The model that it trains, wrapped as it is.
            inputs: A batch of the Trainer's own data.
            num_items: Number of label tokens in all batches of the optimiser step, if the Trainer counts them.

        Returns:
            One offset for each probed layer; none if this step is a plain one, or the harmful move makes no difference.

        Raises:
            ConfigurationError: The model cannot be probed as it is held or trained.
            ArchitectureError: Its layers are not known, or one of those chosen did not run.
            NumericalError: A gradient holds NaN or Inf.
        """
        step = trainer.state.global_step
        if self.config.is_plain or step % self.config.every_n_steps:
            return {}
        opened = self._opened(trainer, model)
        with opened.ranks.together():
            batch = self._batch(step, trainer.args.gradient_accumulation_steps)
            opened.runnable.train()  # as the step itself is about to do
            optimizer: Any = trainer.optimizer
            if callable(getattr(optimizer, "train", None)):
                optimizer.train()
            inputs = trainer._prepare_inputs(inputs)  # type: ignore[arg-type]
            if num_items is not None:  # of this batch alone, so that accumulation does not change what is found
                num_items = trainer._get_num_items_in_batch([inputs], trainer.args.device)

            def useful_loss() -> Tensor:
                # What it adds to the dictionary stays out of the step's own.
                loss = trainer.compute_loss(opened.runnable, dict(inputs), num_items_in_batch=num_items)
                return cast(Tensor, loss)

            with _undisturbed(opened.runnable, trainer), in_own_precision(opened.runnable):
                parameters = [one for one in opened.runnable.parameters() if one.requires_grad]
                move = self._harmful_move(opened, parameters, batch)
                with _moved(parameters, move):
                    after = self._gradients(opened.runnable, useful_loss)
                before = self._gradients(opened.runnable, useful_loss)
            rises = _summed(opened, [one - other for one, other in zip(after, before, strict=True)])
            return self._scaled([rise / opened.ranks.size for rise in rises])

    def _batch(self, step: int, accumulation: int) -> list[PreferencePair]:
        self._micro = self._micro + 1 if step == self._step else 0
        self._step = step
        number = step // self.config.every_n_steps * accumulation + self._micro
        return draw(self._pairs, number, self.config.batch_size, self.config.seed)

    def _opened(self, trainer: Trainer, model: nn.Module) -> ShardedModel:
        if self._model is None or self._model.model is not model:
            _require_supported(trainer)
            opened = open_model(model)
            with opened.ranks.together():
                _require_probeable(opened, self.config.epsilon)
                sequences = [sequence.input_ids for pair in self._pairs for sequence in pair]
                require_fit(opened.runnable, sequences, "pairs")
                self._layers = chosen_layers(opened.runnable, self.config.layers)
            self._model = opened
        return self._model

    def _harmful_move(
        self, model: ShardedModel, parameters: Sequence[nn.Parameter], batch: Sequence[PreferencePair]
    ) -> list[Tensor]:
        own = model.ranks.share(batch)
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        if own:
            with random_state_kept(model.runnable):
                chosen, rejected = log_likelihoods(model.runnable, own)
                scale = self.config.temperature
                loss = LOSSES[self.config.loss](chosen / scale, rejected / scale, batch)
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = [zero if one is None else one for zero, one in zip(gradients, found, strict=True)]
        gradients = _summed(model, gradients)
        size = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(size):
            raise NumericalError("safety probe: the gradient of the safety loss holds NaN or Inf")
        if size == 0:
            return gradients
        norm = float(nn.utils.get_total_norm([parameter.detach() for parameter in parameters]))
        torch._foreach_mul_(gradients, self.config.epsilon * norm / size)
        return gradients

    def _gradients(self, model: nn.Module, useful_loss: Callable[[], Tensor]) -> list[Tensor]:
        offsets: Offsets = {}
        # From one random state, so that the difference of two passes is not one of dropout masks.
        with random_state_kept(model), _frozen(model), _added_to(self._layers, offsets):
            loss = useful_loss()
            missing = [number for number, layer in enumerate(self._layers) if layer not in offsets]
            if missing:
                raise ArchitectureError(
                    f"safety probe: {len(missing)} of the {len(self._layers)} probed layers did not run; choose others "
                    "with SafetyProbeConfig(layers=...)"
                )
            wanted = [offsets[layer] for layer in self._layers]
            return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))

    def _scaled(self, rises: Sequence[Tensor]) -> Offsets:
        found: Offsets = {}
        for layer, rise in zip(self._layers, rises, strict=True):
            size = float(rise.square().mean().sqrt())
            if not math.isfinite(size):
                raise NumericalError("safety probe: a gradient of the Trainer's loss holds NaN or Inf")
            if size > 0:
                found[layer] = rise * (self.config.beta / (size if self.config.normalise == "rms" else 1.0))
        return found


def chosen_layers(model: nn.Module, layers: Literal["middle"] | Sequence[int]) -> list[nn.Module]:
    """The decoder layers whose hidden states are moved.

    Args:
        model: A causal language model.
        layers: Their numbers from 0, or "middle".

    Returns:
        The modules, in the order in which they run.

    Raises:
        ConfigurationError: The model has no layer of that number.
    """
    found = [layer for _, layer in decoder_layers(model)]
    first, last = (int(len(found) * share) for share in MIDDLE)
    numbers = range(first, last + 1) if layers == "middle" else sorted(set(layers))
    outside = [number for number in numbers if not (isinstance(number, int) and 0 <= number < len(found))]
    if outside:
        raise ConfigurationError(
            f"SafetyProbeConfig: layers={outside} are not among the {len(found)} decoder layers, numbered from 0"
        )
    return [found[number] for number in numbers]


def _require_supported(trainer: Trainer) -> None:
    args = trainer.args
    reasons = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "torch.compile (a compiled graph calls no hooks that come later)": args.torch_compile,
        "float16 with loss scaling": getattr(trainer.accelerator, "scaler", None) is not None,
        "nn.DataParallel (start it with torchrun instead)": args.n_gpu > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                f"safety probe: moves the trained weights for two passes of each step, which is not covered under "
                f"{reason}; train in one process or with DDP, in float32 or bf16 autocast"
            )


def _require_probeable(model: ShardedModel, epsilon: float) -> None:
    if not model.is_local:
        raise ConfigurationError(
            f"safety probe: the model's weights are held by {model.kind}, where they cannot be moved for two passes of "
            "each step; train in one process or with DDP"
        )
    for name in model.all_names:
        parameter = model.live(name)
        if is_quantised(parameter):
            raise ConfigurationError(
                f"safety probe: {name} is quantised, and its rounding drowns a move of the weights above it; load the "
                "base in float32"
            )
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"safety probe: {name} is trained in {parameter.dtype}, in which a move of 1e-5 of its norm is lost to "
                "rounding; load the model in float32 and use bf16=True for speed"
            )
        least = ROUNDING_STEPS * torch.finfo(parameter.dtype).eps
        if epsilon < least:
            raise ConfigurationError(
                f"safety probe: {name} is in {parameter.dtype}, where the difference that a move of epsilon="
                f"{epsilon:g} makes is lost to rounding; load the model in float32, or set epsilon to at least "
                f"{least:.2g}"
            )
    for module in model.model.modules():
        checkpointing = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(checkpointing, "keywords", {}).get("use_reentrant"):
            raise ConfigurationError(
                "safety probe: reentrant gradient checkpointing gives no gradients of hidden states; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _summed(model: ShardedModel, tensors: list[Tensor]) -> list[Tensor]:
    if model.ranks.size == 1:
        return tensors
    flat = model.ranks.sum_(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], move: Sequence[Tensor]) -> Iterator[None]:
    # Copied and copied back: to subtract what was added would leave a rounding error in every weight at every step.
    with torch.no_grad():
        originals = [parameter.detach().clone() for parameter in parameters]
        try:
            torch._foreach_add_(list(parameters), list(move))
            with torch.enable_grad():
                yield
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    # Only offsets need gradients: so the passes keep nothing of layers below them, and end there.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


_BOOKKEEPING: Final = ("_metrics", "_total_train_tokens")
"""What Trainers of TRL count in `compute_loss`."""


@contextmanager
def _undisturbed(model: nn.Module, trainer: Trainer) -> Iterator[None]:
    # Buffers that a forward pass moves, such as running statistics, and what the Trainer counts of the passes.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    counted = {name: deepcopy(vars(trainer)[name]) for name in _BOOKKEEPING if name in vars(trainer)}
    try:
        yield
    finally:
        for buffer, original in buffers:
            buffer.copy_(original)
        for name, value in counted.items():
            setattr(trainer, name, value)


def _added(offsets: Offsets) -> "ExitStack":
    return _hooked(offsets, lambda layer, hidden: offsets[layer])


def _added_to(layers: Sequence[nn.Module], offsets: Offsets) -> "ExitStack":
    # Zeros that gradients flow to, made when the first hidden states show their size.
    def offset(layer: nn.Module, hidden: Tensor) -> Tensor:
        if layer not in offsets:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            offsets[layer] = torch.zeros(hidden.shape[-1], dtype=dtype, device=hidden.device, requires_grad=True)
        return offsets[layer]

    return _hooked(layers, offset)


def _hooked(layers: Iterable[nn.Module], offset: Callable[[nn.Module, Tensor], Tensor]) -> ExitStack:
    def add(layer: nn.Module, _: Any, output: Any) -> Any:  # noqa: ANN401
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise ArchitectureError(
                f"safety probe: {type(layer).__name__} returns a {type(hidden).__name__}, not hidden states"
            )
        moved = hidden + offset(layer, hidden).to(hidden)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    hooks = ExitStack()
    for layer in layers:
        hooks.callback(layer.register_forward_hook(add).remove)
    return hooks
