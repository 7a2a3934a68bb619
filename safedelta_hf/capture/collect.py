"""One pass of the base model over the safety data."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.forward import batches_of_equal_length, forward_arguments, require_fit
from safedelta_hf.capture.observer import Observer, every_product_visible
from safedelta_hf.capture.packed import packed_products
from safedelta_hf.capture.parametrised import ParametrisedWeights, computed_weights
from safedelta_hf.capture.safety_data import SafetySequence
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.capture.targets import Targets
from safedelta_hf.capture.undisturbed import undisturbed, without_adapters
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import CaptureError, ConfigurationError, NumericalError
from safedelta_hf.names import base_modules, parameter_names, unwrapped
from safedelta_hf.parametrised import ParametrisedWeight
from safedelta_hf.quantised import is_quantised
from safedelta_hf.records import Role, Use

DIAGONAL = (Role.EMBEDDING, Role.SCALE, Role.OFFSET, Role.BIAS)
"""Roles whose inputs do not mix."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What one pass over the safety data found.

    Attributes:
        uses: How each covered parameter is used.
        moments: Moments by key, in host memory.
        skipped: Reason by parameter name for those that cannot be covered.
        parametrised: Names of the parameters that a weight is computed from, by its canonical name.
        storage: What holds the moments; their files, if any, live as long.
    """

    uses: tuple[Use, ...]
    moments: Mapping[str, InputMoment]
    skipped: Mapping[str, str]
    parametrised: Mapping[str, tuple[str, ...]]
    storage: MomentStorage


def capture_moments(
    model: nn.Module,
    sequences: Sequence[SafetySequence],
    *,
    storage: MomentStorage,
    batch_size: int = 8,
    share_moments: bool = True,
    purpose: str = "safety data",
    targets: Targets | None = None,
    progress: bool = True,
) -> Capture:
    """Read the safety data once and sum the moments of every layer.

    Sequences are batched with others of exactly their length, so no padding ever enters a moment, whatever shapes a
    model's layers see. The model is left as it was, also after an exception.

    Args:
        model: The base model, on any device.
        sequences: Tokenised safety data.
        storage: Where the moments are held while they are summed.
        batch_size: Sequences per forward pass, at most.
        share_moments: Whether layers that read the same tensor share one moment.
        purpose: What errors and the progress bar call the data.
        targets: Which linear weights are read; all of them if None.
        progress: Whether to show a progress bar.

    Returns:
        The moments, and what could not be covered.

    Raises:
        CaptureError: The model has no linear layer, or none was reached, or it is an encoder-decoder model.
        ConfigurationError: The targets choose none of its linear weights.
    """
    _check_model(model)
    require_fit(model, [sequence.input_ids for sequence in sequences], purpose)
    parameters = {name: parameter for parameter, name in parameter_names(model).items()}
    targets = targets or Targets()
    with undisturbed(model):
        weights = ParametrisedWeights.of(model)
    own = {name: parameter for name, parameter in parameters.items() if name not in weights.originals}
    matrices: dict[str, Tensor] = {**own, **{name: weight.shaped() for name, weight in weights.followed.items()}}
    collector = MomentCollector(
        matrices,
        storage,
        head=_head(model, weights.followed.values()),
        chosen=frozenset(filter(targets.include, matrices)),
        share=share_moments,
    )
    observer = Observer(own, collector)
    device = next(model.parameters()).device
    batches = list(batches_of_equal_length(sequences, batch_size))
    with (
        without_adapters(model),
        undisturbed(model),
        every_product_visible(model),
        packed_products(model, observer),
        computed_weights(weights.followed.values(), observer),
    ):
        for batch in tqdm(batches, desc=f"Reading {purpose}", unit="batch", disable=not progress):
            _forward(model, batch, device, observer)
    moments, uses = collector.moments(len(sequences)), collector.uses()
    _require_products(model, uses, collector.untargeted, targets)
    untargeted = dict.fromkeys(collector.untargeted, f"it is not among the targets ({targets.names!r})")
    used = {use.parameter for use in uses}
    return Capture(
        uses=tuple(uses),
        moments=moments,
        skipped=_reasons(model, used, observer.unread | untargeted, weights),
        parametrised={name: weight.originals for name, weight in weights.followed.items() if name in used},
        storage=storage,
    )


def _forward(model: nn.Module, batch: Sequence[SafetySequence], device: torch.device, observer: Observer) -> None:
    input_ids = torch.tensor([sequence.input_ids for sequence in batch], device=device)
    labels = torch.tensor([sequence.labels for sequence in batch], device=device)
    arguments = forward_arguments(model, input_ids, labels)
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    observer.start_batch(len(batch), input_ids.shape[1], given)
    with observer:
        model(**arguments)


def _check_model(model: nn.Module) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder model; only models that read prompt and response as one "
            "sequence are covered"
        )
    for name, parameter in model.named_parameters():
        if not is_quantised(parameter) and not torch.isfinite(parameter).all():
            raise NumericalError(f"{name}: the base model holds NaN or Inf in this weight; load an intact checkpoint")


def _head(model: nn.Module, computed: Iterable[ParametrisedWeight]) -> str | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    if not isinstance(head, nn.Module):
        return None
    layer = unwrapped(head)
    own = dict(layer.named_parameters(recurse=False))  # its attribute may be computed, and that is not asked for here
    if "weight" in own:
        return parameter_names(model).get(own["weight"])
    return next((weight.name for weight in computed if weight.owner is layer and weight.key == "weight"), None)


def _require_products(model: nn.Module, uses: Sequence[Use], untargeted: Collection[str], targets: Targets) -> None:
    if not uses:
        raise CaptureError(f"{type(model).__name__}: the safety data reached no weight; is forward() the right entry?")
    if untargeted and all(use.role in DIAGONAL for use in uses):
        raise ConfigurationError(
            f"targets={targets.names!r}, layers_to_transform={targets.layers_to_transform!r} choose none of the "
            f"{len(untargeted)} linear weights of {type(model).__name__}, such as {min(untargeted)}"
        )
    if all(use.role in DIAGONAL for use in uses):
        raise CaptureError(
            f"{type(model).__name__} has no linear layer that the safety data reaches, so nothing to adjust"
        )


def _reasons(
    model: nn.Module, used: Collection[str], unread: Mapping[str, str], weights: ParametrisedWeights
) -> dict[str, str]:
    owners = {parameter: module for _, module in base_modules(model) for parameter in module.parameters(recurse=False)}
    reasons = {}
    for parameter, name in parameter_names(model).items():
        weight = weights.originals.get(name, name)
        if weight not in used:
            kind = type(owners[parameter]).__name__
            unreached = f"the safety data never reached it, unless inside a fused kernel, in {kind}"
            reasons[name] = weights.reasons.get(name) or unread.get(weight, unreached)
    return reasons
