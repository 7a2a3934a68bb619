"""One base and one fine-tuned model of the user's, as the subject of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.compare.candidates import ALIGNED, FINE_TUNED, Contender, Made, TunedModel
from safedelta_hf.evaluation.evaluate import evaluate_model
from safedelta_hf.evaluation.fingerprint import model_digest
from safedelta_hf.evaluation.questions import EvaluationSettings, Questions, digest_of_prompts
from safedelta_hf.evaluation.result import Score
from safedelta_hf.profile.profile import SafetyProfile

Data = str | Path | Sequence[Mapping[str, Any]]

UTILITIES = {"task_accuracy": "gain", "over_refusal": "cost"}


class ModelSubject:
    """A base and a fine-tuned model, held in memory, with the data for profiles and the questions to ask.

    Args:
        name: What the fine-tuned model is called.
        base: The base model.
        tuned: The fine-tuned model; it is adjusted in place, and a copy of its weights is kept in host memory.
        processing_class: Tokenizer of both.
        questions: What every model is asked, harmful prompts among them.
        safety_data: Harmful prompts with refusals.
        task_data: Examples of the fine-tuning data, for rules that weigh them.
        ordinary_data: Ordinary prompts with the base's responses, for retention.
        settings: How responses are made.

    Raises:
        SafeDeltaError: Data cannot be read, or do not fit the model.
    """  # noqa: DOC502 - raised by the functions called

    seed: int | None = None

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
        settings: EvaluationSettings | None = None,
    ) -> None:
        self.name = name
        self.base = base
        self._processing_class, self._questions = processing_class, questions
        self._settings = settings or EvaluationSettings()
        self._digests = {"base": model_digest(base, processing_class), "tuned": model_digest(tuned, processing_class)}
        self.profile = self._profile(safety_data, "safety data", None)
        self.task = None if task_data is None else self._profile(task_data, "task data", 0.0)
        self.ordinary = None if ordinary_data is None else self._profile(ordinary_data, "ordinary data", 0.0)
        self.tuned = TunedModel(tuned)

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
        }

    @property
    def baselines(self) -> Sequence[Contender]:
        """Both models as they are."""
        return [
            Contender(method=ALIGNED, settings={}, make=lambda: Made(self.base, 0.0)),
            Contender(method=FINE_TUNED, settings={}, make=lambda: Made(self.tuned.restored(), 0.0)),
        ]

    def measure(self, model: PreTrainedModel) -> Mapping[str, Score]:
        """Ask a model everything there is to ask.

        Args:
            model: The model.

        Returns:
            Scores as in `evaluate_model`.
        """
        return evaluate_model(
            model,
            self._processing_class,
            self._questions,
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=self._settings.batch_size,
            progress=False,
        ).scores

    def _profile(self, data: Data, purpose: str, holdout: float | None) -> SafetyProfile:
        return collect_profile(
            self.base,
            data,
            self._processing_class,
            config=ProfileConfig(batch_size=self._settings.batch_size, holdout=holdout),
            purpose=purpose,
            progress=False,
        )
