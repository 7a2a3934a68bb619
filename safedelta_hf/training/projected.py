"""Projected training: while a model is trained, its delta is held where the safety data does not look."""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from safedelta_hf.adapter.adjust import plan_adapter, require_adjustable, require_base
from safedelta_hf.adjust.factors import FactorCache
from safedelta_hf.adjust.plan import check_entries
from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.core.null_space import null_space
from safedelta_hf.core.transform import Transform
from safedelta_hf.data.dataset import Source
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.lora_deltas import LoraDelta
from safedelta_hf.deltas.lora_layers import lora_deltas
from safedelta_hf.deltas.sharded import ShardedDelta
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import AdapterError, BaseWeightsError, ConfigurationError, ProfileError
from safedelta_hf.model.adjust import plan_model
from safedelta_hf.modules.adapters import trained_adapter
from safedelta_hf.modules.names import bare
from safedelta_hf.profile.profile import SafetyProfile, with_ordinary
from safedelta_hf.records.plan import Action, PlanEntry, Treatment
from safedelta_hf.rules import Ridge
from safedelta_hf.rules.rule import LayerMoments, Shrinking, number, require_number
from safedelta_hf.weights.digest import fingerprint
from safedelta_hf.weights.journal import base_weights_loaded
from safedelta_hf.weights.readers import open_base, verified

OWNER = "ProjectedTraining"

SUPPORTED = ("whole", "FSDP2")
"""Ways of holding a model in which a parameter can be written at each step without a trace anywhere else."""


@dataclass(frozen=True, kw_only=True)
class NullSpace(Shrinking):
    """`D* = D P` with `P` the projector on the directions that the safety data hardly uses.

    Args:
        strength: Share of the Hessian's trace that may be left to the delta, in [0, 1]; 1 keeps it as it is.
    """

    name: ClassVar[str] = "null_space"
    mildest: ClassVar[float] = 1.0
    search_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @override
    def factorise(self, moments: LayerMoments) -> Transform:
        return null_space(moments.safety, number(self.strength))


class ProjectedTraining(TrainerCallback):
    """Holds a fine-tuning's delta, after its optimiser steps, where the base's safety data does not look.

    With `D` the delta of a weight and `H` the Hessian of its safety loss, after each n-th step

        `D <- D (I + lam H)^-1`   (`strength`), a decoupled weight decay in the metric of what is to be kept, or
        `D <- D P`                (`hard`), `P` the projector on the near-null space of `H` (arXiv 2510.14301).

    Of a LoRA `D = s B A`, this is `A <- A (I + lam H)^-1` or `A <- A P`. It is the weight that is multiplied, not the
    gradient, which Adam would scale back.

    Args:
        safety_dataset: Harmful prompts with the responses of a safe model, usually refusals, in any form that TRL
            takes; read with the base before the first step.
        profile: A profile made before, instead of `safety_dataset`.
        strength: `lam`, at least 0; 0 is plain training. Each projection shrinks anew, so it acts at every step.
        hard: Instead of `strength`, the share of each Hessian's trace that is left to the delta, in [0, 1]; 1 is plain
            training. Applied once more when training has ended.
        every_n_steps: After which optimiser steps the delta is projected.
        ordinary_dataset: Ordinary prompts with the base model's responses, protected beside the refusals:
            `H + rho R`.
        ordinary_weight: `rho`.
        config: How the data is read, and which linear weights are projected; all of it, nothing held out, if None.
        base: The base model or its folder, if it is not what the model holds when training starts, as in a run that was
            resumed. Adapters have theirs below them.
        treatment: What to do with embeddings, norms, biases and the head ("adjust" or "keep"), and with what cannot be
            covered.
        processing_class: Tokenizer or processor for the data; the Trainer's own if None.

    Attributes:
        profile: What the projection is made of; None until training has started, unless it was given.

    Raises:
        ConfigurationError: Not exactly one of `safety_dataset` and `profile`, or of `strength` and `hard`, was given,
            or a setting is outside its range or has no effect.
    """

    def __init__(
        self,
        safety_dataset: Source | None = None,
        *,
        profile: SafetyProfile | None = None,
        strength: float | None = None,
        hard: float | None = None,
        every_n_steps: int = 1,
        ordinary_dataset: Source | None = None,
        ordinary_weight: float = 0.1,
        config: ProfileConfig | None = None,
        base: nn.Module | str | Path | None = None,
        treatment: Treatment | None = None,
        processing_class: ProcessingClass | None = None,
    ) -> None:
        if (safety_dataset is None) == (profile is None):
            raise ConfigurationError("ProjectedTraining: pass either safety_dataset or profile")
        if profile is not None and ordinary_dataset is not None:
            raise ConfigurationError("ProjectedTraining: ordinary_dataset has no effect beside a profile made before")
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigurationError(
                f"ProjectedTraining: every_n_steps={every_n_steps!r} must be a whole number of at least 1"
            )
        self._rule = _rule_of(strength, hard)
        self._every = every_n_steps
        self._safety = safety_dataset
        self._ordinary, self._ordinary_weight = ordinary_dataset, ordinary_weight
        self._config = config or ProfileConfig(holdout=0.0)
        self._given_base = base
        self._treatment = treatment or Treatment()
        self._processing_class = processing_class
        self.profile = self._given_profile = profile
        self._progress = True
        self._model: weakref.ref[nn.Module] | None = None
        self._projection: _Projection | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: ProcessingClass | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Keep the base, and factor what it finds of the safety data.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            model: The model that will be trained.
            processing_class: The Trainer's tokenizer or processor.
            **kwargs: Unused.

        Raises:
            ConfigurationError: The model cannot be projected as it is held or trained.
            SafeDeltaError: Its base is unknown, the profile was made for another, or a trained weight is not covered.
        """
        model = bare(model, OWNER)
        size = Ranks.of_run().size
        if args.world_size != size:
            raise ConfigurationError(
                f"ProjectedTraining: this run has {args.world_size} processes, of which torch.distributed knows "
                f"{size}; start it with torchrun or accelerate launch"
            )
        if self._projection is not None and self._model is not None and self._model() is model:
            return  # trained further, or once more with smaller batches: from the same base
        with Ranks.of_run().together():
            self._projection = None
            opened = open_model(model)
            _require_projectable(opened)
            self._progress = state.is_world_process_zero and not args.disable_tqdm
            tokenizer = self._processing_class or processing_class
            base = self._base_of(opened, state, Path(args.output_dir or "."), tokenizer)
            assert self.profile is not None, "it was given, or has been collected"
            entries = _entries(opened, self.profile, self._treatment, self._rule)
            self._projection = _Projection(opened, entries, self.profile, self._rule, base)
        self._model = weakref.ref(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Project the weights, if it is their turn; before they are saved or evaluated.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            **kwargs: Unused.
        """
        if state.global_step % self._every == 0:
            self._started().apply()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Project once more what is to lie in the null space, whichever checkpoint was loaded.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            **kwargs: Unused.
        """
        if isinstance(self._rule, NullSpace):
            self._started().apply()

    def _started(self) -> "_Projection":
        if self._projection is None:
            raise BaseWeightsError("ProjectedTraining has not seen training start; add it before train()")
        return self._projection

    def _base_of(
        self, model: ShardedModel, state: TrainerState, folder: Path, processing_class: ProcessingClass | None
    ) -> dict[str, Tensor]:
        # Base weights of what is trained in place; and the profile of that base, if it was not given.
        trained = [name for name in model.names if model.live(name).requires_grad]
        self.profile = self._given_profile
        if getattr(model.model, "peft_config", None) or (self._given_base is None and state.global_step == 0):
            self.profile = self.profile or self._collected(model, processing_class)
            _require_base(model, self.profile)
            return {name: model.read(name).clone() for name in trained}
        if self._given_base is None:
            raise BaseWeightsError(
                f"ProjectedTraining: resumed at step {state.global_step}, so the model does not hold the base; "
                "pass base=<folder or model that the fine-tuning started from>"
            )
        reader = open_base(self._given_base, model.model)
        if self.profile is None:
            with base_weights_loaded(model, trained, reader, folder):
                self.profile = self._collected(model, processing_class)
        header = self.profile.header
        if set(header.base) != set(model.names):
            raise ProfileError(f"profile: made for another model ({header.architecture}); collect one of this base")
        return {
            name: verified(reader, name, header.dtypes[name], header.base[name], model).to(model.read(name), copy=True)
            for name in trained
        }

    def _collected(self, model: ShardedModel, processing_class: ProcessingClass | None) -> SafetyProfile:
        assert self._safety is not None, "there is no profile, so there is safety data"

        def read(data: Source, config: ProfileConfig, purpose: str) -> SafetyProfile:
            return collect_profile(
                model, data, processing_class, config=config, progress=self._progress, purpose=purpose
            )

        profile = read(self._safety, self._config, SAFETY_DATA)
        if self._ordinary is None:
            return profile
        ordinary = read(self._ordinary, replace(self._config, holdout=0.0), "ordinary data")
        return with_ordinary(profile, ordinary, self._ordinary_weight)


def _rule_of(strength: float | None, hard: float | None) -> Ridge | NullSpace:
    if (strength is None) == (hard is None):
        raise ConfigurationError("ProjectedTraining: pass either strength (lam) or hard (a share of the trace)")
    if hard is None:
        require_number("ProjectedTraining", "strength", strength, "at least 0 and finite", lambda v: 0 <= v < math.inf)
        assert strength is not None
        return Ridge(strength=strength)
    require_number("ProjectedTraining", "hard", hard, "in [0, 1]", lambda v: 0 <= v <= 1)
    return NullSpace(strength=hard)


class _Projection:
    """The projection of one model, factored once.

    Args:
        model: The model.
        entries: The parameters to project, and how they are used.
        profile: Profile of their base.
        rule: What makes the transforms.
        base: Base weights of the parameters that are trained in place, by name.
    """

    def __init__(
        self,
        model: ShardedModel,
        entries: Sequence[PlanEntry],
        profile: SafetyProfile,
        rule: Ridge | NullSpace,
        base: dict[str, Tensor],
    ) -> None:
        self._model = model
        self._adapter = trained_adapter(model.model, OWNER)
        self._entries = {entry.parameter: entry for entry in entries}
        self._base = {name: weight for name, weight in base.items() if name in self._entries}
        self._transforms: dict[str, Transform] = {}
        uses = [use for entry in entries for use in entry.uses]
        factors = FactorCache(profile, uses=uses, ranks=model.ranks)
        for entry, delta, _ in self._deltas():
            for use in entry.uses:
                if use.moment not in self._transforms:
                    factors.hold((use,), delta.device)
                    self._transforms[use.moment] = factors.transform(rule, use, delta.matrix(use))

    def apply(self) -> None:
        """Project every parameter, or, if anything fails, none."""
        before: dict[str, Tensor] = {}
        try:
            with self._model.ranks.together():
                for entry, delta, source in self._deltas():
                    for use in entry.uses:
                        delta = delta.transformed(use, self._transforms[use.moment])
                    for name, value in self._tensors(entry, delta, source).items():
                        before[name] = self._model.read(name).clone()
                        self._model.write(name, value)
        except BaseException:
            for name, value in before.items():
                self._model.write(name, value)
            raise

    def _deltas(self) -> Iterator[tuple[PlanEntry, Delta, LoraDelta | None]]:
        # Each delta as it is now, and what it is of, if that is an adapter.
        model = self._model
        if self._adapter is not None:
            for source in lora_deltas(model, self._adapter):
                if source.parameter in self._entries:
                    yield self._entries[source.parameter], source.delta(), source
            return
        for name, base in self._base.items():
            delta, shard = DenseDelta(model.read(name), base), model.shard(name)
            whole = delta if shard.is_whole else ShardedDelta(delta, model.shape(name), shard, model.ranks)
            yield self._entries[name], whole, None

    def _tensors(self, entry: PlanEntry, delta: Delta, source: LoraDelta | None) -> dict[str, Tensor]:
        if source is not None:
            adjusted = source.adjusted(delta).tensors
            return {name: self._model.shard(name).of(value) for name, value in adjusted.items()}
        assert isinstance(delta, DenseDelta | ShardedDelta), "a model's deltas are dense"
        return {entry.parameter: delta.weight()}


def _entries(
    model: ShardedModel, profile: SafetyProfile, treatment: Treatment, rule: Ridge | NullSpace
) -> list[PlanEntry]:
    adapter = trained_adapter(model.model, OWNER)
    if adapter is None:
        trained = {name for name in model.names if model.live(name).requires_grad}
        planned = plan_model(model, profile, treatment).entries
        entries = [entry for entry in planned if not trained.isdisjoint((entry.parameter, *entry.originals))]
    else:
        entries = list(plan_adapter(model, profile, treatment, adapter).entries)
    check_entries(entries, profile, rule, None, is_dense=lambda _: False)
    for entry in entries:
        if entry.originals:
            raise ConfigurationError(
                f"{entry.parameter}: is computed from {', '.join(entry.originals)}, so its delta cannot be projected "
                "while those are trained; fold the parametrisation, or freeze them"
            )
        if entry.action is Action.RESET:
            raise ConfigurationError(
                f"{entry.parameter}: would be reset to the base after every step; freeze it instead, or say 'keep'"
            )
    return [entry for entry in entries if entry.action is Action.ADJUST]


def _require_projectable(model: ShardedModel) -> None:
    if model.kind not in SUPPORTED:
        raise ConfigurationError(
            f"ProjectedTraining: the model's weights are held by {model.kind}, where they cannot be written at every "
            "step; train in one process, with DDP or with FSDP2"
        )
    adapter = trained_adapter(model.model, OWNER)
    if adapter is not None and (bias := require_adjustable(model.model, adapter).bias) != "none":
        raise AdapterError(
            f"ProjectedTraining: the adapter (bias={bias!r}) trains biases of the base itself; use bias='none'"
        )
    for name in model.all_names:
        parameter = model.live(name)
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigurationError(
                f"ProjectedTraining: {name} is trained in {parameter.dtype}, whose rounding undoes a small projection; "
                "load the model in float32 and use bf16=True for speed"
            )


def _require_base(model: ShardedModel, profile: SafetyProfile) -> None:
    if trained_adapter(model.model, OWNER) is not None:
        require_base(model, profile.header)
        return
    found = fingerprint(model)
    other = sorted(name for name in {*found, *profile.header.base} if found.get(name) != profile.header.base.get(name))
    if other:
        raise ProfileError(
            f"profile: made for another base: {len(other)} weights differ from what the model holds, such as "
            f"{other[0]}; collect a profile of the model that is fine-tuned, or pass base=<the profile's>"
        )
