"""Evaluation during training, as a Trainer callback."""

from collections.abc import Sequence
from typing import Any, Literal, cast

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from typing_extensions import override

from safedelta_hf.data.dataset import SafetySequence, Source, read_safety_data
from safedelta_hf.data.rows import kept
from safedelta_hf.data.templates import ProcessingClass, tokenizer_of
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ConfigurationError, EvaluationError, foreign_errors_named
from safedelta_hf.evaluation import Evaluation, Judge, Prompt, Questions, evaluate_model, model_digest
from safedelta_hf.evaluation.questions import EvaluationSettings, PromptSource
from safedelta_hf.evaluation.scoring import TaskScore
from safedelta_hf.hf.trainer_facts import log_metrics, put_before_trackers, shows_progress, trainer_of

PREFIX = "safedelta/eval_"
"""What the name of every logged score begins with."""

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class EvaluationCallback(TrainerCallback):
    """Logs during training what the model refuses, what it should not refuse, and what it can do.

    The scores are those of `evaluate_model`, under `safedelta/eval_<score>` in the Trainer's log history and in its
    trackers. They are measured on the main process, while the others wait for it, on the model as it is at that
    moment, and the model is left as it was: mode, cache setting, generation settings and random state. They are
    measured again when training has ended, unless the model is then the one that was measured last; given after a
    `SafeDeltaCallback`, the last scores are those of the adjusted model.

    Args:
        harmful: Requests that should be refused: path of a file with one prompt per line, or rows.
        benign: Requests that look harmful and should not be refused.
        refusals: Prompts with the refusals to them, whose likelihood is measured, in any form that TRL takes.
        task_questions: Questions of the task, with `score`.
        score: Called with a response and its row; returns how right it is, from 0 to 1.
        judge: Called with prompt and response; returns how harmful the response is, from 0 to 1.
        every: "epoch", a number of optimizer steps, or None for the end of training alone.
        examples: How many of each kind to use at most, the first ones; None for all.
        max_new_tokens: Length limit of a response, in tokens.
        batch_size: Prompts or responses per forward pass.
        processing_class: Tokenizer or processor; the Trainer's own if None.

    Attributes:
        evaluation: The last one; None before the first.

    Raises:
        ConfigurationError: There is nothing to ask, or a setting is out of range.
        DataError: Prompts cannot be read.
    """

    def __init__(
        self,
        harmful: PromptSource | None = None,
        benign: PromptSource | None = None,
        refusals: Source | None = None,
        *,
        task_questions: PromptSource | None = None,
        score: TaskScore | None = None,
        judge: Judge | None = None,
        every: Literal["epoch"] | int | None = "epoch",
        examples: int | None = 50,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        processing_class: ProcessingClass | None = None,
    ) -> None:
        if every not in ("epoch", None) and not _is_count(every):
            raise ConfigurationError(f"every={every!r} is not 'epoch', a number of steps of at least 1, or None")
        if examples is not None and not _is_count(examples):
            raise ConfigurationError(f"examples={examples!r} is not a whole number of at least 1, or None")
        self.evaluation: Evaluation | None = None
        self._every = every
        self._examples = examples
        self._settings = EvaluationSettings(max_new_tokens=max_new_tokens, batch_size=batch_size)
        self._processing_class = processing_class
        self._refusals = kept(refusals)
        asked = Questions.read(
            harmful=harmful, benign=benign, refusals=self._refusals, task=task_questions, score=score, judge=judge
        )
        self._harmful, self._benign, self._task = (
            self._first(part) for part in (asked.harmful, asked.benign, asked.task)
        )
        self._score, self._judge = score, judge

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: ProcessingClass | None = None,
        **kwargs: Any,
    ) -> None:
        if (trainer := trainer_of(state)) is not None:
            put_before_trackers(self, trainer)
        # Check what would otherwise fail in the middle of training.
        with Ranks.of_run().together():
            self._usable(args, model)
            self._questions(self._processing(processing_class))

    @override
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if isinstance(self._every, int) and state.global_step % self._every == 0:
            self._measure(args, state, control, **kwargs)

    @override
    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self._every == "epoch":
            self._measure(args, state, control, **kwargs)

    @override
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # Measure the model that training leaves, unless it was measured already.
        self._measure(args, state, control, only_if_changed=True, **kwargs)

    def _measure(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        processing_class: ProcessingClass | None = None,
        only_if_changed: bool = False,
        **_: Any,  # noqa: ANN401
    ) -> None:
        # One process asks; the others hold the same weights, and wait as long as it takes.
        ranks = Ranks.of_run()
        with ranks.together():
            usable, processing = self._usable(args, model), self._processing(processing_class)
            found = None
            if state.is_world_process_zero and not (only_if_changed and self._is_of(usable, processing)):
                found = self._evaluated(usable, processing, args, state)
            found = ranks.broadcast(found, owner=0)
        if found is not None:
            self.evaluation = found
            log_metrics(found.metrics(PREFIX), trainer_of(state), args, state, control)

    def _is_of(self, model: PreTrainedModel, processing: ProcessingClass) -> bool:
        return self.evaluation is not None and self.evaluation.model == model_digest(model, processing)

    def _evaluated(
        self, model: PreTrainedModel, processing: ProcessingClass, args: TrainingArguments, state: TrainerState
    ) -> Evaluation:
        # Memory that runs out here must not look like a training batch that is too large.
        with foreign_errors_named(
            f"EvaluationCallback measured at step {state.global_step}",
            "lower batch_size, max_new_tokens or examples if memory ran out",
            EvaluationError,
        ):
            return evaluate_model(
                model,
                processing,
                self._questions(processing),
                max_new_tokens=self._settings.max_new_tokens,
                batch_size=self._settings.batch_size,
                progress=shows_progress(args, state),
            )

    def _questions(self, processing: ProcessingClass) -> Questions:
        rows = None
        if self._refusals is not None:
            rows = [_tokens(sequence) for sequence in read_safety_data(self._refusals, processing)[: self._examples]]
        return Questions(
            harmful=self._harmful,
            benign=self._benign,
            refusals=rows,
            task=self._task,
            score=self._score,
            judge=self._judge,
        )

    def _first(self, prompts: Sequence[Prompt] | None) -> Sequence[Prompt] | None:
        return None if prompts is None else prompts[: self._examples]

    def _processing(self, processing_class: ProcessingClass | None) -> ProcessingClass:
        chosen = self._processing_class or processing_class
        if chosen is None or tokenizer_of(chosen) is None:
            raise ConfigurationError(
                "EvaluationCallback: there is no tokenizer; pass processing_class=tokenizer (to the Trainer or to the "
                "callback)"
            )
        return chosen

    def _usable(self, args: TrainingArguments, model: nn.Module | None) -> PreTrainedModel:
        bare = getattr(model, "_orig_mod", model)
        if not isinstance(bare, nn.Module) or not callable(getattr(bare, "generate", None)):
            raise ConfigurationError(
                f"EvaluationCallback: {type(bare).__name__} has no generate(), so it cannot be asked"
            )
        require_whole(args, bare)
        return cast(PreTrainedModel, bare)


def require_whole(args: TrainingArguments, model: nn.Module) -> None:
    """Stop where one process cannot generate by itself, because it does not hold the weights.

    Args:
        args: Of the Trainer.
        model: The bare model.

    Raises:
        ConfigurationError: The weights are sharded.
    """
    state = getattr(args, "distributed_state", None)
    kind = DistributedType.NO if state is None else state.distributed_type
    # Models may be sharded without accelerate's knowledge: by transformers (DTensor), by DeepSpeed's own API (ds_id).
    sharded = any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())
    if kind in _SHARDED or sharded:
        raise ConfigurationError(
            f"EvaluationCallback: the weights of this run are sharded ({kind.value}), and one process that generates "
            "alone would wait for the others for ever; train without it, then evaluate the saved model with "
            "`safedelta eval`"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _tokens(sequence: SafetySequence) -> dict[str, list[int]]:
    return {"input_ids": list(sequence.input_ids), "labels": list(sequence.labels)}
