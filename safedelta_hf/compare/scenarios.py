"""What is compared on: a base, a fine-tuned model and data, from which candidates are made and measured."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from safedelta_hf.adapter.adjust import adjust_adapter, plan_adapter
from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.errors import AdapterError, NothingLeftError, warn
from safedelta_hf.evaluation.evaluate import evaluate_model
from safedelta_hf.evaluation.generation import model_digest
from safedelta_hf.evaluation.questions import EvaluationSettings, Questions, digest_of_prompts
from safedelta_hf.evaluation.result import Score
from safedelta_hf.model.adjust import adjust_model
from safedelta_hf.profile.profile import SafetyProfile, with_ordinary
from safedelta_hf.records.plan import Treatment
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule

ALIGNED: Final = "aligned"
FINE_TUNED: Final = "fine-tuned"

FULL: Final = "full"
LORA: Final = "lora"
WEIGHTS: Final = {FULL: "all weights", LORA: "a LoRA"}
"""What was trained, in words."""

Data = str | Path | Sequence[Mapping[str, Any]]

UTILITIES = {"task_accuracy": "gain", "over_refusal": "cost"}


class CandidateModel(NamedTuple):
    """A model that is ready to be measured.

    Attributes:
        model: The model; the next candidate may change it.
        seconds: Time that making it took.
        search: How the strength was found, as plain values; None where it was given.
    """

    model: PreTrainedModel
    seconds: float
    search: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to make a model.

    Attributes:
        method: As in `Point`.
        settings: What tells it from others of the same method.
        make: Makes the model.
    """

    method: str
    settings: Mapping[str, Any]
    make: Callable[[], CandidateModel]


class TunedModel:
    """A fine-tuned model that is adjusted in place, again and again.

    Args:
        model: The model, perhaps with an adapter; a copy of its weights is kept in host memory.
        seconds: Time that the fine-tuning took, where it was measured.
    """

    def __init__(self, model: PreTrainedModel, seconds: float = 0.0) -> None:
        self._model = model
        self._weights = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        self.seconds = seconds

    @property
    def weights(self) -> str:
        """What was trained: "full" or "lora"."""
        return LORA if _has_adapter(self._model) else FULL

    def restored(self) -> PreTrainedModel:
        """The model as the fine-tuning left it.

        Returns:
            The one model, changed in place.
        """
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(self._weights[name])
        return self._model


class Scenario(ABC):
    """A base, a model that was fine-tuned from it, the data of both, and a measure of models.

    What is expensive is made when it is first asked for.

    Attributes:
        name: What was fine-tuned on, or the fine-tuned model's folder.
        seed: Seed of the fine-tuning, where the comparison made it.
        weights: What was trained, "full" or "lora". An adapter is adjusted as one, at its own rank.
        base: The base model.
    """

    name: str
    seed: int | None
    weights: str
    base: PreTrainedModel

    @property
    @abstractmethod
    def tuned(self) -> TunedModel:
        """The fine-tuned model."""

    @property
    @abstractmethod
    def profile(self) -> SafetyProfile:
        """Profile of the base on safety data, part of it held out."""

    @property
    @abstractmethod
    def task(self) -> SafetyProfile | None:
        """Profile of the base on the task data, if there are any and it would not refuse all of them."""

    @property
    @abstractmethod
    def ordinary(self) -> SafetyProfile | None:
        """Profile of the base on ordinary data, if there are any."""

    @property
    def baselines(self) -> Sequence[Candidate]:
        """What the rules are compared with: both models as they are, and perhaps more."""
        return [
            Candidate(method=ALIGNED, settings={}, make=lambda: CandidateModel(self.base, 0.0)),
            Candidate(
                method=FINE_TUNED,
                settings=self.fine_tuning,
                make=lambda: CandidateModel(self.tuned.restored(), self.tuned.seconds),
            ),
        ]

    @property
    def fine_tuning(self) -> Mapping[str, Any]:
        """Settings of the fine-tuning, where the comparison made it."""
        return {}

    @abstractmethod
    def measure(self, model: PreTrainedModel) -> Mapping[str, Score]:
        """Measure a model.

        Args:
            model: The model.

        Returns:
            Scores by name, `attack_success` among them.
        """

    def takes(self, rule: Rule) -> bool:
        """Whether a rule can adjust what was trained.

        Args:
            rule: The rule.

        Returns:
            False for one that needs whole weights, on an adapter.
        """
        return self.weights == FULL or not rule.needs_dense

    def adjusted(
        self,
        rule: Rule,
        ordinary_weight: float = 0.0,
        *,
        tuned: Callable[[], TunedModel] | None = None,
        task: Callable[[], SafetyProfile] | None = None,
        method: str | None = None,
    ) -> Candidate:
        """The fine-tuned model as a rule adjusts it.

        Args:
            rule: The rule.
            ordinary_weight: Weight of the ordinary data; 0 is without.
            tuned: Another fine-tuned model of the same base and task.
            task: Another profile of the task data, for rules that weigh them.
            method: What it is called; the rule's name if None.

        Returns:
            The candidate; nothing is made yet.
        """

        def make() -> CandidateModel:
            model, profile = (tuned() if tuned else self.tuned).restored(), self.profile
            if ordinary_weight:
                assert self.ordinary is not None, "checked before anything was made"
                profile = with_ordinary(profile, self.ordinary, ordinary_weight)
            weighed = (task() if task else self.task) if rule.needs_task else None
            applied = rule if weighed is not None or not rule.needs_task else rule.without_task()
            started = time.perf_counter()
            report = _adjust(model, self.base, profile, applied, weighed)
            seconds = time.perf_counter() - started
            return CandidateModel(model, seconds, None if report.search is None else asdict(report.search))

        return Candidate(
            method=method or rule.name, settings={**rule.settings, "ordinary_weight": ordinary_weight}, make=make
        )


def _adjust(
    model: PreTrainedModel, base: PreTrainedModel, profile: SafetyProfile, rule: Rule, task: SafetyProfile | None
) -> Report:
    adjust = adjust_adapter if _has_adapter(model) else adjust_model
    with warnings.catch_warnings():
        # The table says so.
        warnings.filterwarnings("ignore", message=".*Even the strictest strength.*")
        return adjust(model, base=base, profile=profile, rule=rule, task_profile=task, progress=False)


def _has_adapter(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "peft_config", None))


class ModelScenario(Scenario):
    """A base and a fine-tuned model, held in memory, with the data for profiles and the questions to ask.

    Args:
        name: What the fine-tuned model is called.
        base: The base model.
        tuned: The fine-tuned model; it is adjusted in place, and a copy of its weights is kept in host memory. With
            an adapter on it, the adapter is adjusted; one that cannot be, as it stands, is merged, with a warning.
        processing_class: Tokenizer of both.
        questions: What every model is asked, harmful prompts among them.
        safety_data: Harmful prompts with refusals.
        task_data: Examples of the fine-tuning data, for rules that weigh them.
        ordinary_data: Ordinary prompts with the base's responses, to protect them too.
        sort_task: Whether examples that the base would refuse are left out of the task.
        settings: How responses are made.

    Raises:
        SafeDeltaError: Data cannot be read, or do not fit the model.
    """

    def __init__(
        self,
        name: str,
        base: PreTrainedModel,
        tuned: PreTrainedModel,
        processing_class: PreTrainedTokenizerBase,
        questions: Questions,
        *,
        safety_data: Data,
        task_data: Data | None = None,
        ordinary_data: Data | None = None,
        sort_task: bool = True,
        settings: EvaluationSettings | None = None,
    ) -> None:
        self.name, self.seed, self.base = name, None, base
        self._processing_class, self._questions = processing_class, questions
        self._settings = settings or EvaluationSettings()
        self._digests = {"base": model_digest(base, processing_class), "tuned": model_digest(tuned, processing_class)}
        self._profile = self._profiled(safety_data, SAFETY_DATA, None)
        self._sorted_by = safety_data if sort_task and task_data is not None else None
        self._task = None if task_data is None else self._task_profile(task_data)
        self._ordinary = None if ordinary_data is None else self._profiled(ordinary_data, "ordinary data", 0.0)
        self._tuned = TunedModel(_merged_unless_adjustable(tuned, self._profile))
        self.weights = self._tuned.weights

    @property
    @override
    def tuned(self) -> TunedModel:
        return self._tuned

    @property
    @override
    def profile(self) -> SafetyProfile:
        return self._profile

    @property
    @override
    def task(self) -> SafetyProfile | None:
        return self._task

    @property
    @override
    def ordinary(self) -> SafetyProfile | None:
        return self._ordinary

    @property
    def made_with(self) -> dict[str, Any]:
        """What all points depend on: fingerprints of models, data and prompts, and settings."""
        profiles = {"safety data": self.profile, "task data": self.task, "ordinary data": self.ordinary}
        asked = {"harmful": self._questions.harmful, "benign": self._questions.benign, "task": self._questions.task}
        score = self._questions.score
        return {
            **self._digests,
            **{name: None if profile is None else profile.header.data for name, profile in profiles.items()},
            **{name: None if prompts is None else digest_of_prompts(prompts) for name, prompts in asked.items()},
            "score": None if score is None else getattr(score, "__qualname__", type(score).__qualname__),
            "max_new_tokens": self._settings.max_new_tokens,
            "sort_task": self._sorted_by is not None,
        }

    @override
    def measure(self, model: PreTrainedModel) -> Mapping[str, Score]:
        return evaluate_model(
            model,
            self._processing_class,
            self._questions,
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=self._settings.batch_size,
            progress=False,
        ).scores

    def _task_profile(self, data: Data) -> SafetyProfile | None:
        try:
            return self._profiled(data, "task data", 0.0, self._sorted_by)
        except NothingLeftError:
            return None  # a warning tells

    def _profiled(
        self, data: Data, purpose: str, holdout: float | None, sorted_by: Data | None = None
    ) -> SafetyProfile:
        return collect_profile(
            self.base,
            data,
            self._processing_class,
            config=ProfileConfig(batch_size=self._settings.batch_size, holdout=holdout),
            purpose=purpose,
            sorted_by=sorted_by,
            progress=False,
        )


def _merged_unless_adjustable(model: PreTrainedModel, profile: SafetyProfile) -> PreTrainedModel:
    if not _has_adapter(model):
        return model
    try:
        plan_adapter(model, profile, Treatment())
    except AdapterError as error:
        merge = getattr(model, "merge_and_unload", None)
        if merge is None:  # an adapter that transformers put on the model itself
            raise
        warn(f"The adapter is merged into its base and compared as a model: {error}")
        merged: PreTrainedModel = merge()
        return merged
    return model
