"""The polish of a run: what is learned of its base and of its fine-tune at the right moments, and what is done then."""

from functools import partial
from pathlib import Path

from transformers import TrainingArguments

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.data.batches import require_same
from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.data.refusals import HeldOut, require_likelihoods
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.ranks import is_shared
from safedelta_hf.errors import (
    ConfigurationError,
    NothingLeftError,
    RestoreError,
    SafeDeltaError,
    foreign_errors_named,
    warn,
)
from safedelta_hf.evaluation.sorting import sort_task
from safedelta_hf.hf.profiles import RunData, task_examples
from safedelta_hf.hf.trainer_facts import OWNER
from safedelta_hf.polish.config import QUANTILE, PolishConfig
from safedelta_hf.polish.lessons import Lessons, aside, lessons_of, lessons_of_base
from safedelta_hf.polish.polish import polish_weights
from safedelta_hf.polish.trainer import require_polishable
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.report.records import PolishRecord


class RunPolish:
    """Polishes the model of a run.

    Args:
        config: Settings.
        data: The data of the run.
        reading: How data is read.
    """

    def __init__(self, config: PolishConfig, data: RunData, reading: ProfileConfig) -> None:
        if data.safety is None:
            raise ConfigurationError(
                f"{OWNER}: polish learns from the refusals themselves, which a profile does not hold; pass "
                "safety_dataset too"
            )
        if reading.holdout == 0:
            raise ConfigurationError(
                f"{OWNER}: polish measures refusals that were held out, and config has holdout=0; leave it out"
            )
        self._config = config
        self._data, self._reading = data, reading
        self._args: TrainingArguments | None = None
        self._run_steps = 0
        self._refusals: HeldOut | None = None
        self._of_base = Lessons(taught={}, held_out={})
        self._task: list[SafetySequence] = []
        self._lessons: Lessons | None = None

    def require_possible(self, model: ShardedModel, args: TrainingArguments, steps: int) -> None:
        """Stop before training if there could be no polish after it, and note what run it is.

        Args:
            model: The model that will be trained.
            args: Of the Trainer.
            steps: Optimiser steps of the run.
        """
        require_polishable(args, model, OWNER)
        require_likelihoods(model.model)
        self._config.steps_of(steps)
        self.of_run(args, steps)
        self._lessons = None  # of the fine-tuning before

    def of_run(self, args: TrainingArguments, steps: int) -> None:
        """Note what run it is.

        Args:
            args: Of the Trainer.
            steps: Optimiser steps of the run.
        """
        self._args, self._run_steps = args, steps

    def learn_from_base(
        self,
        model: ShardedModel,
        profile: SafetyProfile,
        processing_class: ProcessingClass | None,
        train_dataset: object,
        *,
        progress: bool,
    ) -> None:
        """Let the base read refusals and ordinary rows, and draw the rows of the task.

        Args:
            model: The model, holding the base weights.
            profile: Profile of the base.
            processing_class: Tokenizer or processor.
            train_dataset: The Trainer's own data set.
            progress: Whether to show progress bars.

        Raises:
            ConfigurationError: The profile holds no refusals out.
        """
        self._lessons = None
        if profile.held_out is None:
            raise ConfigurationError(
                f"{OWNER}: polish measures refusals that were held out, and the profile has none; collect it with "
                "ProfileConfig(holdout=0.25)"
            )

        def read(source: Source, purpose: str) -> list[SafetySequence]:
            found = read_safety_data(source, processing_class, self._reading.max_length, purpose=purpose)
            require_same(found, model.ranks, purpose)
            return found

        data, batch_size = self._data, self._reading.batch_size
        assert data.safety is not None, "checked when this was made"
        held_out = profile.held_out.sequences
        known = list(dict.fromkeys(read(data.safety, SAFETY_DATA)))
        refusals = [row for row in known if row not in set(held_out)]
        self._of_base = lessons_of_base(
            model,
            (refusals, held_out),
            [] if data.ordinary is None else read(data.ordinary, "ordinary data"),
            holdout=self._config.holdout,
            top_k=self._config.top_k,
            batch_size=batch_size,
            progress=progress,
        )
        self._refusals = HeldOut.measured(model, held_out, batch_size)
        self._task = read(task_examples(data, train_dataset, self._config.task_examples), "task data")
        if data.sort_task:  # the fine-tuned model hands on what it does where the base refuses
            try:
                self._task = list(sort_task(model, self._task, known, processing_class, batch_size=batch_size)[0])
            except NothingLeftError:
                self._task = []

    def learn_from_tuned(self, model: ShardedModel, *, progress: bool) -> None:
        """Let the fine-tuned model read the rows of the task, if it has not yet.

        Args:
            model: The model, holding the fine-tuned weights.
            progress: Whether to show a progress bar.
        """
        if self._lessons is None and not self._task:
            self._lessons = self._of_base
        if self._lessons is None:
            lessons = lessons_of(
                model,
                "task",
                *aside(self._task, self._config.holdout),
                top_k=self._config.top_k,
                batch_size=self._reading.batch_size,
                progress=progress,
            )
            self._lessons = self._of_base.beside(lessons)

    def polish(self, model: ShardedModel, *, workspace: Path | None, progress: bool) -> PolishRecord:
        """Polish the adjusted model; if that fails, it is as it was adjusted, and a warning says why.

        Args:
            model: The model, holding the adjusted weights.
            workspace: Folder with room for a temporary copy of the trained weights.
            progress: Whether to show progress bars.

        Returns:
            What was done.

        Raises:
            SafeDeltaError: It failed, and the adjusted weights could not be put back.
        """
        assert self._lessons is not None and self._refusals is not None and self._args is not None
        steps = self._config.steps_of(self._run_steps)
        run = partial(polish_weights, model, self._lessons, self._refusals, self._args, self._config, steps=steps)
        try:
            with foreign_errors_named("polishing the weights"):
                return run(workspace=workspace, progress=progress)
        except SafeDeltaError as error:
            if isinstance(error, RestoreError) or not is_shared(error):
                raise
            if model.ranks.is_main:
                warn(f"Safe Delta: the adjusted model was not polished: {error}")
            return PolishRecord(
                outcome="failed",
                steps=steps,
                learning_rate=self._args.learning_rate * self._config.rate,
                tolerance=self._config.tolerance,
                quantile=QUANTILE,
                examples=len(self._refusals.sequences),
                reason=f"it failed ({error})",
            )
