"""A base and a fine-tuned model in files, as the subject of a comparison."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.cli.evaluate import load_model
from safedelta_hf.evaluation import Questions, Score, evaluate_model, model_digest
from safedelta_hf.evaluation.comparison import ALIGNED, FINE_TUNED, Contender, Made, TunedModel
from safedelta_hf.evaluation.prompts import digest_of_prompts
from safedelta_hf.evaluation.task import load_function
from safedelta_hf.pipeline import collect_profile

MAX_NEW_TOKENS = 128
BATCH_SIZE = 8


class FilesSubject:
    """A base and a fine-tuned model, held in memory, and files of data.

    Args:
        base: Folder of the base model.
        tuned: Folder of the fine-tuned model.
        safety_data: Harmful prompts with refusals.
        harmful: Requests that should be refused.
        benign: Requests that look harmful and should not be refused.
        task: Questions of the task.
        score: Function that scores the responses to them.
        task_data: Examples of the fine-tuning data.
        ordinary_data: Ordinary prompts with the base's responses.
        max_new_tokens: Length limit of a response, in tokens.
        batch_size: Prompts per forward pass.

    Raises:
        SafeDeltaError: A file or a model cannot be read.
    """  # noqa: DOC502 - raised by the functions called

    seed: int | None = None

    def __init__(
        self,
        *,
        base: str,
        tuned: str,
        safety_data: Path,
        harmful: Path,
        benign: Path | None,
        task: Path | None,
        score: str | None,
        task_data: Path | None,
        ordinary_data: Path | None,
        max_new_tokens: int | None,
        batch_size: int | None,
    ) -> None:
        self.name = Path(tuned).resolve().name
        # Everything that is small is read before anything that is large.
        self._questions = Questions.read(
            harmful=harmful,
            benign=benign,
            task=task,
            score=None if score is None else load_function(score, "--score"),
        )
        self._max_new_tokens, self._batch_size = max_new_tokens or MAX_NEW_TOKENS, batch_size or BATCH_SIZE
        self._score = score
        self.base, _ = load_model(base, "--base")
        loaded, self._tokenizer = load_model(tuned, "--tuned")
        self._digests = {
            name: model_digest(model, self._tokenizer) for name, model in (("base", self.base), ("tuned", loaded))
        }
        self.tuned = TunedModel(loaded)
        self.profile = self._profile(safety_data, "safety data", None)
        self.task = None if task_data is None else self._profile(task_data, "task data", 0.0)
        self.ordinary = None if ordinary_data is None else self._profile(ordinary_data, "ordinary data", 0.0)

    @property
    def made_with(self) -> dict[str, Any]:
        """What all points depend on: fingerprints of models, data and prompts, and settings."""
        profiles = {"safety data": self.profile, "task data": self.task, "ordinary data": self.ordinary}
        asked = {"harmful": self._questions.harmful, "benign": self._questions.benign, "task": self._questions.task}
        return {
            **self._digests,
            **{name: None if profile is None else profile.header.data for name, profile in profiles.items()},
            **{name: None if prompts is None else digest_of_prompts(prompts) for name, prompts in asked.items()},
            "score": self._score,
            "max_new_tokens": self._max_new_tokens,
        }

    @cached_property
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
            Scores as in `safedelta eval`.
        """
        return evaluate_model(
            model,
            self._tokenizer,
            self._questions,
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
            progress=False,
        ).scores

    def _profile(self, data: Path, purpose: str, holdout: float | None) -> SafetyProfile:
        return collect_profile(
            self.base,
            data,
            self._tokenizer,
            batch_size=self._batch_size,
            holdout=holdout,
            purpose=purpose,
            progress=False,
        )
