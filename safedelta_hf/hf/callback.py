"""Safe Delta as a Trainer callback."""

import time
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from safedelta_hf.adapter.adjust import adjust_adapter, require_adjustable
from safedelta_hf.adjust.plan import check_entries
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.data.dataset import Source
from safedelta_hf.data.refusals import require_likelihoods
from safedelta_hf.data.templates import ProcessingClass, require_processing_class
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.offload import require_trainable
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import (
    BaseWeightsError,
    NothingLeftError,
    SafeDeltaError,
    foreign_errors_named,
    require_kind,
)
from safedelta_hf.hf.base_weights import (
    RunBase,
    base_of_run,
    remember,
    require_matching,
    require_recorded,
    warn_of_other_data,
)
from safedelta_hf.hf.polishing import RunPolish
from safedelta_hf.hf.profiles import (
    ProfileCollector,
    RunData,
    require_config_used,
    require_use,
    warn_of_trained_refusals,
)
from safedelta_hf.hf.trainer_facts import (
    OWNER,
    close_training_bar,
    entries_of_trained,
    is_pruned,
    keep_card_section,
    log_metrics,
    output_dir,
    put_before_trackers,
    require_fetched_adapters,
    require_supported,
    shows_progress,
    trainer_of,
    trains_dense,
    warn_of_empty_adapters,
)
from safedelta_hf.hf.tuned import TunedWeights, require_room_for_tuned, save_tuned, whereabouts
from safedelta_hf.model.adjust import adjust_model
from safedelta_hf.modules.adapters import trained_adapter
from safedelta_hf.modules.names import bare
from safedelta_hf.polish.config import PolishConfig
from safedelta_hf.profile.profile import SafetyProfile, opened_profile
from safedelta_hf.records.plan import Treatment
from safedelta_hf.records.sorting import TaskSorting
from safedelta_hf.report import Report
from safedelta_hf.report.printing import printed
from safedelta_hf.report.provenance import remove_provenance
from safedelta_hf.report.saving import follow_saving, is_adjusted
from safedelta_hf.rules import Rule, rule_of
from safedelta_hf.weights.journal import base_weights_loaded

logger = logging.get_logger(__name__)


class SafeDeltaCallback(TrainerCallback):
    """Makes a `Trainer` end with a model that still refuses.

    At train start it reads the safety data with the base model; when training has ended, after the best model was
    loaded, it adjusts the weights in place, so that `save_model`, `evaluate` and `push_to_hub` see the adjusted model.
    Checkpoints saved meanwhile are not adjusted.

    On a `PeftModel` it reads the safety data with the adapter disabled and adjusts the adapter that was trained, at its
    own rank; the frozen base is neither copied nor changed.

    A second `train()` on the same model measures its delta from the same base as the first. A resumed run reads its
    base from the files that the first run recorded in its checkpoints, or from `base`.

    Args:
        safety_dataset: Harmful prompts with the responses of a safe model, usually refusals; a Dataset, a list of
            dicts, the path of a file (JSON lines, a JSON array, CSV, Parquet), or the name of a data set on the Hub, in
            any form that TRL takes. Not needed by rules that read none, such as `Scale(strength=1.0)`.
        rule: Which part of each delta to keep, or the name of a rule; `TaskRidge()` if None, whose strength is
            measured.
        config: How the data is read, and which linear weights are adjusted; `ProfileConfig()` if None.
        profile: A profile made before, or the folder of one, instead of `safety_dataset`.
        ordinary_dataset: Ordinary prompts with the base model's responses: what the model could do is protected beside
            its refusals.
        ordinary_weight: Weight of that data against the safety data.
        task_dataset: Examples of the fine-tuning data, for rules that weigh them; drawn from the Trainer's own if None.
        task_examples: Number of examples to draw from the Trainer's own.
        sort_task: Whether those of them that the base would refuse are left out; if none is left, the rule is used
            without a task.
        base: The aligned model (or its folder), if it is not what the model holds when training starts.
        treatment: What to do with embeddings, norms, biases, the head, and what cannot be covered.
        keep_tuned: Folder to save the fine-tuned model to before it is adjusted; must not exist, unless this run saved
            it before it was resumed.
        processing_class: Tokenizer or processor for the safety data; the Trainer's own if None.
        polish: Whether, and how, the adjusted model is polished: some steps in which it learns from the base how to
            refuse (`safety_dataset`, which may then stand beside a `profile`) and to answer ordinary prompts
            (`ordinary_dataset`), and from the fine-tuned model what was taught (`task_dataset`). None for no polish.

    Attributes:
        report: What was done; None until training has ended.
        profile: The safety profile; None until training has started, unless it was given.
        task_profile: The profile of the fine-tuning data, if the rule weighs it; None until training has started, and
            where the base would refuse all of it.
        says_outcome: Whether the outcome is printed when training has ended; launchers say it when the model is saved.

    Raises:
        ConfigurationError: Neither of `safety_dataset` and `profile` was given, and the rule needs one, or both were;
            or an argument is of another kind, outside its range or without effect.
        DataError: There is no such file, a row is none, or there are too few to measure a strength by.
        ProfileError: The profile cannot be read.
    """

    def __init__(
        self,
        safety_dataset: Source | None = None,
        rule: Rule | str | None = None,
        *,
        config: ProfileConfig | None = None,
        profile: SafetyProfile | str | Path | None = None,
        ordinary_dataset: Source | None = None,
        ordinary_weight: float = 0.1,
        task_dataset: Source | None = None,
        task_examples: int = 256,
        sort_task: bool = True,
        base: nn.Module | str | Path | None = None,
        treatment: Treatment | None = None,
        keep_tuned: str | Path | None = None,
        processing_class: ProcessingClass | None = None,
        polish: PolishConfig | None = None,
    ) -> None:
        require_kind(OWNER, "polish", polish, (PolishConfig, type(None)), "a PolishConfig")
        self._rule = rule_of(OWNER, rule, task="drawn from the Trainer's data")
        require_kind(OWNER, "config", config, (ProfileConfig, type(None)), "a ProfileConfig")
        require_kind(OWNER, "treatment", treatment, (Treatment, type(None)), "a Treatment")
        require_kind(OWNER, "base", base, (nn.Module, str, Path, type(None)), "a model, or the folder of one")
        require_kind(OWNER, "keep_tuned", keep_tuned, (str, Path, type(None)), "a folder")
        require_processing_class(OWNER, processing_class)
        self._data = RunData(
            safety=safety_dataset,
            ordinary=ordinary_dataset,
            ordinary_weight=ordinary_weight,
            task=task_dataset,
            task_examples=task_examples,
            sort_task=sort_task,
        )
        require_use(self._data, self._rule, profile=profile, is_polished=polish is not None)
        is_read = profile is None or self._rule.needs_task or polish is not None
        require_config_used(self._data, config, reads_data=is_read, is_polished=polish is not None)
        self.report: Report | None = None
        self.says_outcome = True
        self._given_profile = None if profile is None else opened_profile(OWNER, profile)
        self.profile = self._given_profile
        self.task_profile: SafetyProfile | None = None
        self._config = config or ProfileConfig()
        self._polish = None if polish is None else RunPolish(polish, self._data, self._config)
        self._is_measured = self._rule.auto is not None or polish is not None
        if self._is_measured and self._config.holdout is None:
            self._data.require_enough()
        self._given_base = base
        self._treatment = treatment or Treatment()
        self._keep_tuned = None if keep_tuned is None else Path(keep_tuned)
        self._processing_class = processing_class
        self._run: RunBase | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._tuned: TunedWeights | None = None
        self._nothing_left: TaskSorting | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: ProcessingClass | None = None,
        train_dataloader: Any = None,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Find the base, and collect or check its profile, before the first step.

        Args:
            args: Of the Trainer.
            state: Of the Trainer; the base is entered into it, so that checkpoints name it.
            control: Of the Trainer.
            model: The model that will be trained.
            processing_class: The Trainer's tokenizer or processor.
            train_dataloader: Of the Trainer; examples are drawn from its data set for rules that weigh the task.
            **kwargs: Unused.

        Raises:
            SafeDeltaError: Training would end in a model that cannot be adjusted; named cause.
        """
        model = bare(model, OWNER)
        self._tuned = None
        follow_saving(model, None, writes=state.is_world_process_zero)
        if (trainer := trainer_of(state)) is not None:
            put_before_trackers(self, trainer)
            keep_card_section(trainer)
        require_supported(args)
        with Ranks.of_run().together():
            require_trainable(model)
            opened = open_model(model)
            require_fetched_adapters(opened)
            warn_of_empty_adapters(opened)
            require_room_for_tuned(self._keep_tuned, state)
            if self._polish is not None:
                self._polish.require_possible(opened, args, state.max_steps)
            with foreign_errors_named("reading data with the base model"):
                if self._run is None or self._model is None or self._model() is not model:
                    train_dataset = getattr(train_dataloader, "dataset", None)
                    self._start_from(opened, args, state, self._processing_class or processing_class, train_dataset)
            run, profile = self._started()
            require_recorded(run, state)
            warn_of_other_data(profile, state)
            remember(run, state, profile.header.data)
            entries = entries_of_trained(opened, profile, self._treatment)
            check_entries(entries, profile, self._fitting(self._rule), self.task_profile, is_dense=trains_dense(opened))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: ProcessingClass | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Adjust the trained weights in place and log what was done.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            model: The trained model.
            processing_class: The Trainer's tokenizer or processor, saved with `keep_tuned`.
            **kwargs: Unused.

        Raises:
            SafeDeltaError: The adjustment failed. The tuned weights are in the model as they were, and saved in a
                folder that the error names; `adjust` tries again.
        """
        if is_pruned(state, control):
            logger.info("Safe Delta: this trial was pruned, so its weights are not adjusted.")
            return
        model, trainer = bare(model, OWNER), trainer_of(state)
        if trainer is not None:
            close_training_bar(trainer)
        started = time.perf_counter()
        if self._polish is not None:
            self._polish.of_run(args, state.global_step)
        saved = None
        try:
            with Ranks.of_run().together():
                if self._keep_tuned is not None:
                    with foreign_errors_named("saving the tuned weights"):
                        save_tuned(model, processing_class, self._keep_tuned, state)
                    saved = self._keep_tuned
                with foreign_errors_named("adjusting the weights"):
                    report = self.adjust(model, workspace=output_dir(args), progress=shows_progress(args, state))
        except SafeDeltaError as error:
            error.add_note(whereabouts(error, saved, model, processing_class, output_dir(args), state))
            raise
        self.report = replace(report, seconds=time.perf_counter() - started)
        if self.says_outcome and report.changed_anything and shows_progress(args, state):
            tqdm.write(printed(f"Safe Delta: {report.told}"), end="")
        log_metrics(report.metrics(), trainer, args, state, control, printed=False)

    def on_push_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Take back what the folder says of an earlier adjustment, if weights that are not adjusted will be put there.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            model: The model.
            **kwargs: Unused.
        """
        if state.is_world_process_zero and not is_adjusted(bare(model, OWNER)):
            remove_provenance(output_dir(args))

    def adjust(
        self, model: nn.Module, *, rule: Rule | str | None = None, workspace: Path | None = None, progress: bool = True
    ) -> Report:
        """Adjust a model that was trained with this callback; on failure it is left as it was.

        Called when training ends. To be called again, without training, if that failed, or for another rule or strength
        than was applied: a model that was adjusted already is first given its fine-tuned weights back. Those of an
        adapter are kept in host memory, those of a whole model in the folder `keep_tuned`.

        Args:
            model: The model as training left it, or as it was adjusted.
            rule: Which part of each delta to keep, or the name of a rule; the callback's own rule if None.
            workspace: Folder with room for a temporary copy of the changed weights.
            progress: Whether to show progress bars.

        Returns:
            The report, also kept as `report`.

        Raises:
            BaseWeightsError: The callback has not seen the start of the training.
            ConfigurationError: The model was adjusted already, and its fine-tuned weights were not kept.
        """
        chosen = self._rule if rule is None else rule_of(OWNER, rule, self.task_profile)
        run, profile = self._started()
        opened = open_model(bare(model, OWNER))
        adapter = trained_adapter(opened.model, OWNER)
        adjust = adjust_model if adapter is None else partial(adjust_adapter, adapter_name=adapter)
        again = self._tuned is not None and self._tuned.is_of(opened)
        tuned = self._tuned if again else TunedWeights(opened, self._keep_tuned, is_adapter=adapter is not None)
        assert tuned is not None
        with tuned.put_back(opened, workspace) if again else nullcontext():
            if self._polish is not None:
                self._polish.learn_from_tuned(opened, progress=progress)
            self.report = adjust(
                opened,
                base=run.weights,
                profile=profile,
                rule=self._fitting(chosen),
                task_profile=self.task_profile,
                treatment=self._treatment,
                workspace=workspace,
                progress=progress,
            )
        self._tuned = tuned
        if self._nothing_left is not None and chosen.needs_task:
            self.report = replace(self.report, sorting=self._nothing_left)
        if self._polish is not None and self.report.has_delta:
            record = self._polish.polish(opened, workspace=workspace, progress=progress)
            self.report = replace(self.report, polish=record)
        follow_saving(opened.model, self.report, adapter=adapter, writes=opened.ranks.is_main)
        if self.says_outcome and not self.report.changed_anything and Ranks.of_run().is_main:
            logger.warning("Safe Delta: no weight was changed. %s", self.report.summary())
        return self.report

    def _start_from(
        self,
        model: ShardedModel,
        args: TrainingArguments,
        state: TrainerState,
        processing_class: ProcessingClass | None,
        train_dataset: Any,  # noqa: ANN401
    ) -> None:
        # What belonged to the model before is let go first: copies of its weights, and its moments.
        self._run, self._model = None, None
        self.profile, self.task_profile, self._nothing_left = self._given_profile, None, None
        adapter = trained_adapter(model.model, OWNER)
        if adapter is not None:
            require_adjustable(model.model, adapter)
        if self._rule.auto is not None:
            require_likelihoods(model.model)
        run = base_of_run(model, state, self._given_base, output_dir(args))
        if self.profile is not None:
            require_matching(self.profile, run, processing_class)
        collector = ProfileCollector(
            model=model,
            processing_class=processing_class,
            digests=run.digests,
            config=self._config,
            is_measured=self._is_measured,
            progress=shows_progress(args, state),
        )
        with base_weights_loaded(model, run.moved, run.weights, output_dir(args)):
            self.profile = self.profile or collector.safety(self._data)
            if self._rule.auto is not None and self.profile.held_out is not None and Ranks.of_run().is_main:
                warn_of_trained_refusals(self.profile.held_out, train_dataset)
            if self._rule.needs_task:
                self._read_task(collector, train_dataset, self.profile)
            if self._polish is not None:
                progress = shows_progress(args, state)
                self._polish.learn_from_base(model, self.profile, processing_class, train_dataset, progress=progress)
        self._run, self._model = run, weakref.ref(model.model)

    def _read_task(self, collector: ProfileCollector, train_dataset: Any, profile: SafetyProfile) -> None:  # noqa: ANN401
        try:
            self.task_profile = collector.task(self._data, train_dataset, profile)
        except NothingLeftError as error:
            assert isinstance(error.sorting, TaskSorting), "it was raised by what sorts"
            self._nothing_left = error.sorting
            if Ranks.of_run().is_main:
                logger.warning("Safe Delta: rule %s is used, since there is no task.", self._fitting(self._rule).name)

    def _fitting(self, rule: Rule) -> Rule:
        # Where there turned out to be no task, what a rule is without one.
        return rule if self._nothing_left is None else rule.without_task()

    def _started(self) -> tuple[RunBase, SafetyProfile]:
        if self._run is None or self.profile is None:
            raise BaseWeightsError(
                "SafeDeltaCallback has not seen training start, so it does not know the base; add it before train(), "
                "or use adjust_model(model, base=..., profile=...)"
            )
        return self._run, self.profile
