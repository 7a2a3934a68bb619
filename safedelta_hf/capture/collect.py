"""One pass of the base model over the safety data."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from safedelta_hf.capture.collector import MomentCollector
from safedelta_hf.capture.findings import Findings
from safedelta_hf.capture.forward import arguments_of, input_device, require_fit
from safedelta_hf.capture.moments import Moments
from safedelta_hf.capture.observer import Observer, every_product_visible
from safedelta_hf.capture.packed import packed_products
from safedelta_hf.capture.parametrised import ParametrisedWeights, computed_weights
from safedelta_hf.capture.reduction import Reduction, findings_of_all
from safedelta_hf.capture.safety_data import SafetySequence
from safedelta_hf.capture.shares import Share, forward_guard, share_of
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.capture.targets import Targets
from safedelta_hf.capture.undisturbed import undisturbed, without_adapters
from safedelta_hf.errors import CaptureError, ConfigurationError, NumericalError
from safedelta_hf.names import base_modules, class_name, parameter_names, unwrapped
from safedelta_hf.parametrised import ParametrisedWeight, parametrised_weights
from safedelta_hf.quantised import is_quantised
from safedelta_hf.ranks import Ranks
from safedelta_hf.records import Role, Use
from safedelta_hf.sharding.detect import holding_of
from safedelta_hf.sharding.holding import Holding
from safedelta_hf.sharding.whole import WholeParameters

DIAGONAL = (Role.EMBEDDING, Role.SCALE, Role.OFFSET, Role.BIAS)
"""Roles whose inputs do not mix."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What one pass over the safety data found.

    Attributes:
        uses: How each covered parameter is used.
        moments: Moments by key, in host memory; in a run of several processes each on its owner.
        skipped: Reason by parameter name for those that cannot be covered.
        parametrised: Names of the parameters that a weight is computed from, by its canonical name.
        storage: What holds the moments; their files, if any, live as long.
    """

    uses: tuple[Use, ...]
    moments: Moments
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
    ranks: Ranks | None = None,
    holding: Holding | None = None,
) -> Capture:
    """Read the safety data once and sum the moments of every layer.

    Sequences are batched with others of exactly their length, so no padding ever enters a moment, whatever shapes a
    model's layers see. The model is left as it was, also after an exception.

    In a run of several processes all of them call this, with the same data. Each reads its part, and then each moment
    is summed up on one of them.

    Args:
        model: The base model, on any device; where forward passes are collective, as it is called in training.
        sequences: Tokenised safety data.
        storage: Where the moments are held while they are summed.
        batch_size: Sequences per forward pass, at most.
        share_moments: Whether layers that read the same tensor share one moment.
        purpose: What errors and the progress bar call the data.
        targets: Which linear weights are read; all of them if None.
        progress: Whether to show a progress bar, on the main rank.
        ranks: The ranks that share the work; None for those of the run.
        holding: How they hold the model's parameters; None to find out.

    Returns:
        The moments, and what could not be covered.

    Raises:
        CaptureError: The model has no linear layer, or none was reached, or it is an encoder-decoder model.
        ConfigurationError: The targets choose none of its linear weights, or it is sharded and has weights that are
            computed from parameters.
        RankError: Another rank failed.
    """  # noqa: DOC502 - raised by the functions called
    ranks = ranks or Ranks.of_run()
    with ranks.together():
        holding = holding or holding_of(model)
        _check_model(model, holding)
        require_fit(model, [sequence.input_ids for sequence in sequences], purpose)
        subject = _Subject.of(model, holding, targets or Targets())
        share = share_of(sequences, batch_size, ranks, collective=holding.collective)
        reading = _Reading(subject, share, ranks, f"Reading {purpose}" if progress and ranks.is_main else None)
        findings, collector = reading.read(storage, share_moments=share_moments)
        if findings.unshared and ranks.size > 1:
            # Whether products always read the same tensor cannot be told from a part of the data.
            storage = storage.anew()
            findings, collector = reading.read(storage, share_moments=False)
        if findings.unshared:
            raise CaptureError(f"{findings.unshared}; pass share_moments=False")
        uses = findings.uses(tuple(subject.matrices), subject.chosen)
        untargeted = findings.untargeted(subject.chosen)
        _require_products(model, uses, untargeted, subject.targets)
        reduction = Reduction(
            ranks=ranks,
            storage=storage,
            device=input_device(model),
            places=subject.places,
            sequences=len(sequences),
        )
        moments = reduction.moments(collector.take(), findings, frozenset(use.moment for use in uses))
    unchosen = dict.fromkeys(untargeted, f"it is not among the targets ({subject.targets.names!r})")
    used, weights = {use.parameter for use in uses}, subject.weights
    return Capture(
        uses=tuple(uses),
        moments=moments,
        skipped=_reasons(model, used, {**findings.unread, **unchosen}, weights),
        parametrised={name: weight.originals for name, weight in weights.followed.items() if name in used},
        storage=storage,
    )


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model whose weights are watched.

    Attributes:
        model: The model.
        holding: How this process holds its parameters.
        targets: Which linear weights are read.
        weights: Its weights that are computed from parameters.
        matrices: Something of the shape and device of each weight that is watched, by canonical name.
    """

    model: nn.Module
    holding: Holding
    targets: Targets
    weights: ParametrisedWeights
    matrices: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, holding: Holding, targets: Targets) -> "_Subject":
        names = parameter_names(model).values()
        if holding.kind != WholeParameters.kind and (computed := parametrised_weights(model)):
            raise ConfigurationError(
                f"{next(iter(computed))}: is computed from other parameters, which is not covered in a model under "
                f"{holding.kind}. Train without the callback, then use adjust_model on the saved model"
            )
        with undisturbed(model):
            weights = ParametrisedWeights.of(model)
        matrices = {
            name: torch.empty((), device=holding.device(name)).expand(holding.shape(name))
            for name in names
            if name not in weights.originals
        }
        computed_shapes = {name: weight.shaped() for name, weight in weights.followed.items()}
        return cls(model=model, holding=holding, targets=targets, weights=weights, matrices=matrices | computed_shapes)

    @property
    def chosen(self) -> frozenset[str]:
        """Names of the weights whose products are read."""
        return frozenset(filter(self.targets.include, self.matrices))

    @property
    def places(self) -> dict[str, int]:
        """Number of each weight with two dimensions or more, by name."""
        names = (name for name, weight in self.matrices.items() if weight.ndim >= 2)
        return {name: number for number, name in enumerate(names)}


@dataclass(frozen=True)
class _Reading:
    """Lets a model read this rank's share of the data.

    Attributes:
        subject: The model.
        share: The data.
        ranks: The ranks that read.
        title: What the progress bar says; None for none.
    """

    subject: _Subject
    share: Share
    ranks: Ranks
    title: str | None

    def read(self, storage: MomentStorage, *, share_moments: bool) -> tuple[Findings, MomentCollector]:
        subject = self.subject
        collector = MomentCollector(
            subject.matrices,
            storage,
            head=_head(subject.model, subject.weights.followed.values()),
            chosen=subject.chosen,
            share=share_moments,
        )
        observer = Observer(collector, subject.matrices)
        computed = subject.weights.followed.values()
        with (
            without_adapters(subject.model),
            undisturbed(subject.model),
            every_product_visible(subject.model),
            subject.holding.shown_to(observer),
            packed_products(subject.model, observer),
            computed_weights(computed, observer),
        ):
            self._run(observer, collector)
        return findings_of_all(collector.findings(observer.unread), self.ranks), collector

    def _run(self, observer: Observer, collector: MomentCollector) -> None:
        model, collective = self.subject.model, self.subject.holding.collective
        for batch, counts in tqdm(self.share, desc=self.title, unit="batch", disable=self.title is None):
            with forward_guard(self.ranks, self.subject.holding):
                arguments = arguments_of(model, batch)
                given = [value for value in arguments.values() if isinstance(value, Tensor)]
                observer.start_batch(len(batch), len(batch[0].input_ids), given)
                with observer if counts else nullcontext():
                    model(**arguments)
            if collector.shared is not None and collector.shared.is_void and not collective:
                return


def _check_model(model: nn.Module, holding: Holding) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CaptureError(
            f"{class_name(model)} is an encoder-decoder model; only models that read prompt and response "
            "as one sequence are covered"
        )
    # All are read before anything is said of one: other processes may have to take part in the reading.
    is_finite = {name: _is_finite(holding, name) for name in holding.names}
    for name, finite in is_finite.items():
        if not finite:
            raise NumericalError(f"{name}: the base model holds NaN or Inf in this weight; load an intact checkpoint")


def _is_finite(holding: Holding, name: str) -> bool:
    return is_quantised(holding.parameter(name)) or bool(torch.isfinite(holding.read(name)).all())


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
    kind = class_name(model)
    if not uses:
        raise CaptureError(f"{kind}: the safety data reached no weight; is forward() the right entry?")
    if untargeted and all(use.role in DIAGONAL for use in uses):
        raise ConfigurationError(
            f"targets={targets.names!r}, layers_to_transform={targets.layers_to_transform!r} choose none of the "
            f"{len(untargeted)} linear weights of {kind}, such as {min(untargeted)}"
        )
    if all(use.role in DIAGONAL for use in uses):
        raise CaptureError(f"{kind} has no linear layer that the safety data reaches, so nothing to adjust")


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
