"""The testbed's part in a comparison: its cases as scenarios, and baselines that cost little."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel
from typing_extensions import override

from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.compare import Candidate, CandidateModel, Scenario, TunedModel
from safedelta_hf.errors import NothingLeftError
from safedelta_hf.evaluation import Score
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.rules import TaskRidge
from safedelta_hf.testbed.data import Case, safety_data
from safedelta_hf.testbed.defences import DEFENCES, AlignedModel, Training
from safedelta_hf.testbed.model import behaviour_scores, fine_tune, load_aligned

LOWER_RATES: Final = (0.3, 0.1)
"""Learning rates of plain fine-tuning, in units of the case's."""
RETUNING_EPOCHS: Final = (1, 3)
"""Passes over the safety examples, after the fine-tuning and at the learning rate of the case."""
RETUNING_BATCH: Final = 16
TASK_EXAMPLES: Final = 256
"""Examples of the fine-tuning data behind a task profile, as in the callback."""

UTILITIES: Final = {"new_skill": "gain", "old_skills": "kept"}


class CaseScenario(Scenario):
    """One case, fine-tuned with one seed when that is first needed.

    Args:
        aligned: The aligned model.
        case: What to fine-tune on.
        seed: Seed of the data and of the training.
        questions: Number of questions of each kind.
        defences: Further ways to fine-tune it, out of `DEFENCES`; each is measured alone, and adjusted afterwards.
        sort_task: Whether examples that the aligned model would refuse are left out of the task.
    """

    seed: int

    def __init__(
        self,
        aligned: AlignedModel,
        case: Case,
        seed: int,
        questions: int,
        defences: Sequence[str] = (),
        *,
        sort_task: bool = True,
    ) -> None:
        self.name, self.seed, self.base = case.name, seed, aligned.model
        self._aligned, self._case, self._questions = aligned, case, questions
        self._defences, self._sort_task = tuple(defences), sort_task

    @property
    @override
    def profile(self) -> SafetyProfile:
        return self._aligned.profile

    @property
    @override
    def ordinary(self) -> SafetyProfile:
        return self._aligned.ordinary

    @cached_property
    @override
    def task(self) -> SafetyProfile | None:
        examples = self._case.examples(self.seed)[:TASK_EXAMPLES]  # they are in random order
        try:
            return collect_profile(
                self.base,
                examples,
                self._aligned.tokenizer,
                config=ProfileConfig(holdout=0.0),
                purpose="task data",
                sorted_by=safety_data() if self._sort_task else None,
                progress=False,
            )
        except NothingLeftError:
            return None  # a warning tells

    @cached_property
    @override
    def tuned(self) -> TunedModel:
        return TunedModel(*self._trained(load_aligned()[0], self._case))

    @property
    @override
    def fine_tuning(self) -> Mapping[str, Any]:
        return _settings(self._case)

    @property
    @override
    def baselines(self) -> Sequence[Candidate]:
        # Both models as they are, lower learning rates, and re-tuning on the safety data.
        case = self._case
        lower = [replace(case, learning_rate=case.learning_rate * factor) for factor in LOWER_RATES]
        again = [
            replace(case, make=lambda _: safety_data(), epochs=epochs, batch_size=RETUNING_BATCH)
            for epochs in RETUNING_EPOCHS
        ]
        return [
            *super().baselines,
            *(self._training("lower learning rate", other, lambda: load_aligned()[0]) for other in lower),
            *(self._training("re-tuned", other, lambda: self.tuned.restored()) for other in again),
            *(candidate for name in self._defences for candidate in self._defended(name)),
        ]

    @override
    def measure(self, model: PreTrainedModel) -> Mapping[str, Score]:
        return behaviour_scores(
            model, self._aligned.tokenizer, has_new_skill=self._case.teaches is not None, questions=self._questions
        )

    def _defended(self, name: str) -> Iterator[Candidate]:
        # Trained once for both.
        @cache
        def tuned() -> TunedModel:
            training = DEFENCES[name](self._aligned, self._case, self.seed)
            return TunedModel(*self._trained(load_aligned()[0], self._case, training))

        settings, rule = _settings(self._case), TaskRidge()
        yield Candidate(
            method=name, settings=settings, make=lambda: CandidateModel(tuned().restored(), tuned().seconds)
        )
        yield self.adjusted(rule, 0.0, tuned=tuned, method=f"{name}, then {rule.name}")

    def _training(self, method: str, case: Case, start: Callable[[], PreTrainedModel]) -> Candidate:
        return Candidate(
            method=method, settings=_settings(case), make=lambda: CandidateModel(*self._trained(start(), case))
        )

    def _trained(
        self, model: PreTrainedModel, case: Case, training: Training | None = None
    ) -> tuple[PreTrainedModel, float]:
        training = training or Training()
        training.prepare(model)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(
                model,
                self._aligned.tokenizer,
                case,
                seed=self.seed,
                output=Path(folder),
                rows=training.rows,
                make_trainer=training.make_trainer,
                callbacks=training.callbacks,
                progress=False,
            )
        return model, time.perf_counter() - started


def _settings(case: Case) -> dict[str, float]:
    return {"epochs": case.epochs, "learning_rate": case.learning_rate, "batch_size": case.batch_size}
