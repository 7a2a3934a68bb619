"""The testbed's part in a comparison: its cases as scenarios, and the methods that rules are compared with."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedModel
from typing_extensions import override

from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.compare import FULL, LORA, Candidate, CandidateModel, Scenario, TunedModel
from safedelta_hf.errors import NothingLeftError
from safedelta_hf.evaluation import Score
from safedelta_hf.hf.callback import SafeDeltaCallback
from safedelta_hf.polish.config import PolishConfig
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.rules import TaskRidge
from safedelta_hf.testbed.data import Case, ordinary_data, safety_data
from safedelta_hf.testbed.defences import DEFENCES, AlignedModel, Training
from safedelta_hf.testbed.model import behaviour_scores, fine_tune, load_aligned, lora_case, tokenize, with_lora

LOWER_RATES: Final = (0.3, 0.1)
"""Learning rates of plain fine-tuning, in units of the usual one."""
RETUNING_EPOCHS: Final = (1, 3)
"""Passes over the safety examples, after the fine-tuning and at its learning rate."""
RETUNING_BATCH: Final = 16
ORDINARY_ROWS: Final = 512
"""Ordinary rows that a polish is given; few leave most of the old skills to chance."""
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
        methods: What the rules are compared with besides both models, out of `METHODS`.
        weights: What to train: "full", all weights; or "lora", a LoRA on all linear layers.
        sort_task: Whether examples that the aligned model would refuse are left out of the task.
    """

    seed: int

    def __init__(
        self,
        aligned: AlignedModel,
        case: Case,
        seed: int,
        questions: int,
        methods: Sequence[str] = (),
        weights: str = FULL,
        *,
        sort_task: bool = True,
    ) -> None:
        self.name, self.seed, self.base, self.weights = case.name, seed, aligned.model, weights
        self.aligned, self._questions, self._methods = aligned, questions, tuple(methods)
        self.case = lora_case(case) if weights == LORA else case
        self._sort_task = sort_task

    @property
    @override
    def profile(self) -> SafetyProfile:
        return self.aligned.profile

    @property
    @override
    def ordinary(self) -> SafetyProfile:
        return self.aligned.ordinary

    @cached_property
    @override
    def task(self) -> SafetyProfile | None:
        examples = self.case.examples(self.seed)[:TASK_EXAMPLES]  # they are in random order
        try:
            return collect_profile(
                self.base,
                examples,
                self.aligned.tokenizer,
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
        return TunedModel(*self.trained())

    @property
    @override
    def fine_tuning(self) -> Mapping[str, Any]:
        return _settings(self.case)

    @property
    @override
    def baselines(self) -> Sequence[Candidate]:
        return [*super().baselines, *(candidate for name in self._methods for candidate in METHODS[name](self))]

    @override
    def measure(self, model: PreTrainedModel) -> Mapping[str, Score]:
        teaches = self.case.teaches is not None
        if model is self.base:
            return self.aligned.scores(self._questions, has_new_skill=teaches)
        return behaviour_scores(model, self.aligned.tokenizer, has_new_skill=teaches, questions=self._questions)

    def trained(
        self, *, case: Case | None = None, start: PreTrainedModel | None = None, training: Training | None = None
    ) -> tuple[PreTrainedModel, float]:
        """Fine-tune a model with this seed.

        Args:
            case: Other data or training arguments than the case's.
            start: What to train further, in place; None for the aligned model, with a fresh LoRA where one is trained.
            training: What a defence changes.

        Returns:
            The model, and the seconds that training took.
        """
        model, training = start or self._aligned_again(), training or Training()
        training.prepare(model)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(
                model,
                self.aligned.tokenizer,
                case or self.case,
                seed=self.seed,
                output=Path(folder),
                rows=training.rows,
                make_trainer=training.make_trainer,
                callbacks=training.callbacks,
                progress=False,
            )
        return model, time.perf_counter() - started

    def _aligned_again(self) -> PreTrainedModel:
        model = load_aligned()[0]
        return with_lora(model, self.seed) if self.weights == LORA else model


Method = Callable[[CaseScenario], Iterator[Candidate]]
"""Another way to a model of a case: one candidate, or several that belong together."""


def _lower_rate(scenario: CaseScenario) -> Iterator[Candidate]:
    for factor in LOWER_RATES:
        case = replace(scenario.case, learning_rate=scenario.case.learning_rate * factor)
        yield _candidate(f"learning rate x {factor:g}", case, partial(scenario.trained, case=case))


def _retuned(scenario: CaseScenario) -> Iterator[Candidate]:
    for epochs in RETUNING_EPOCHS:
        case = replace(scenario.case, make=lambda _: safety_data(), epochs=epochs, batch_size=RETUNING_BATCH)
        yield _candidate(
            f"re-tuned, {epochs} epoch{'s' * (epochs > 1)}",
            case,
            partial(_trained_further, scenario, case),
        )


def _trained_further(scenario: CaseScenario, case: Case) -> tuple[PreTrainedModel, float]:
    return scenario.trained(case=case, start=scenario.tuned.restored())


def _mixed_in(scenario: CaseScenario) -> Iterator[Candidate]:
    # The examples of the profile, all of them: the Trainer shuffles.
    def trained() -> tuple[PreTrainedModel, float]:
        rows = tokenize([*scenario.case.examples(scenario.seed), *safety_data()], scenario.aligned.tokenizer)
        return scenario.trained(training=Training(rows=rows))

    yield _candidate("safety data mixed in", scenario.case, trained)


def _defended(name: str, scenario: CaseScenario) -> Iterator[Candidate]:
    # Trained once for both.
    @cache
    def tuned() -> TunedModel:
        return TunedModel(*scenario.trained(training=DEFENCES[name](scenario.aligned, scenario.case, scenario.seed)))

    rule = TaskRidge()
    yield _candidate(name, scenario.case, lambda: (tuned().restored(), tuned().seconds))
    yield scenario.adjusted(rule, tuned=tuned, method=f"{name}, then {rule.name}")


def _polished(scenario: CaseScenario) -> Iterator[Candidate]:
    # As a user does it: one callback, from the first step to the last.
    def trained() -> tuple[PreTrainedModel, float]:
        ordinary = ordinary_data(ORDINARY_ROWS)
        callback = SafeDeltaCallback(safety_data(), ordinary_dataset=ordinary, polish=PolishConfig())
        return scenario.trained(training=Training(callbacks=(callback,)))

    yield _candidate(f"{TaskRidge.name}, then polished", scenario.case, trained)


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "lower_rate": _lower_rate,
        "retuned": _retuned,
        "mixed_in": _mixed_in,
        "polish": _polished,
        **{name: partial(_defended, name) for name in DEFENCES},
    }
)
"""What rules are compared with on the testbed, by name; a new one is one line."""

CHEAP: Final = ("lower_rate", "retuned", "mixed_in")
"""Those that cost little, and are compared where nothing else is asked for."""


def _candidate(method: str, case: Case, trained: Callable[[], tuple[PreTrainedModel, float]]) -> Candidate:
    return Candidate(method=method, settings=_settings(case), make=lambda: CandidateModel(*trained()))


def _settings(case: Case) -> dict[str, float]:
    return {"epochs": case.epochs, "learning_rate": case.learning_rate, "batch_size": case.batch_size}
