"""Training defences on the testbed: further ways to fine-tune a case."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Final

from transformers import PreTrainedModel, Trainer, TrainerCallback

from safedelta_hf.capture.collect import collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.evaluation import Score
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.testbed.data import Case, ordinary_data, preference_pairs, safety_data, skill_questions
from safedelta_hf.testbed.model import behaviour_scores, load_aligned
from safedelta_hf.training import (
    FreezeSafetyLayers,
    ProjectedTraining,
    SafetyLayers,
    SafetyProbeConfig,
    derta_rows,
    freeze_layers,
    locate_safety_layers,
    mix_safety,
    refusal_mix,
    with_safety_probe,
)

SHARE: Final = 0.1
"""Share of what is mixed into the examples of a case; three in a hundred, as the authors, would be 3 of some."""
PROJECTION: Final = 1e-3
"""Strength of the projection after each step."""
QUERIES: Final = 48
"""Queries of each kind by which safety layers are located."""
WEAKENED: Final = 0.9
"""Factor of the layers meanwhile: this model refuses more where it is weakened, and never where it is strengthened."""


class AlignedModel:
    """The aligned model with its profiles, shared by all cases."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_aligned()
        self._scores: dict[int, dict[str, Score]] = {}

    def scores(self, questions: int, *, has_new_skill: bool) -> dict[str, Score]:
        """What it does by itself, measured once for all cases and seeds.

        Args:
            questions: As in `behaviour_scores`.
            has_new_skill: As in `behaviour_scores`.

        Returns:
            The shares.
        """
        if questions not in self._scores:
            self._scores[questions] = behaviour_scores(
                self.model, self.tokenizer, has_new_skill=True, questions=questions
            )
        return {name: score for name, score in self._scores[questions].items() if has_new_skill or name != "new_skill"}

    @cached_property
    def profile(self) -> SafetyProfile:
        """Profile on the safety data."""
        return collect_profile(self.model, safety_data(), self.tokenizer, progress=False)

    @cached_property
    def ordinary(self) -> SafetyProfile:
        """Profile on ordinary data."""
        return collect_profile(
            self.model,
            ordinary_data(),
            self.tokenizer,
            config=ProfileConfig(holdout=0.0),
            purpose="ordinary data",
            progress=False,
        )

    @cached_property
    def safety_layers(self) -> SafetyLayers:
        """The layers by which it recognises harmful requests."""
        normal, harmless = (skill_questions(QUERIES, seed=seed, skills=("make",)) for seed in (0, 1))
        return locate_safety_layers(
            self.model,
            self.tokenizer,
            normal=[{"messages": question.messages} for question in normal],
            malicious=safety_data(QUERIES),
            over_refusal=[{"messages": question.messages} for question in harmless],
            alpha=WEAKENED,
            progress=False,
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a defence changes in the fine-tuning of a case.

    Attributes:
        rows: Training data, tokenised; None for the case's own.
        make_trainer: Makes the Trainer.
        callbacks: Its callbacks.
        prepare: Done to the model before.
    """

    rows: Sequence[Mapping[str, Any]] | None = None
    make_trainer: Callable[..., Trainer] = Trainer
    callbacks: tuple[TrainerCallback, ...] = ()
    prepare: Callable[[PreTrainedModel], object] = id


Defence = Callable[[AlignedModel, Case, int], Training]
"""Given a case and a seed."""


def _pairs(seed: int) -> list[dict[str, Any]]:
    return preference_pairs(128, seed, pool="refused")


def _mixture(aligned: AlignedModel, case: Case, seed: int) -> Training:
    refusals = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _pairs(seed)]
    return Training(rows=mix_safety(case.examples(seed), refusals, aligned.tokenizer, share=SHARE, seed=seed))


def _derta(aligned: AlignedModel, case: Case, seed: int) -> Training:
    rows = derta_rows(_pairs(seed), aligned.tokenizer, keep=0.05, seed=seed)
    return Training(rows=mix_safety(case.examples(seed), rows, aligned.tokenizer, share=SHARE, seed=seed))


def _refusals(aligned: AlignedModel, case: Case, seed: int) -> Training:
    rows = refusal_mix(case.examples(seed), ordinary_data(seed=seed), aligned.tokenizer, refusals=SHARE, seed=seed)
    return Training(rows=rows)


def _probe(aligned: AlignedModel, case: Case, seed: int) -> Training:
    config = SafetyProbeConfig(pairs=_pairs(seed), seed=seed)
    return Training(make_trainer=partial(with_safety_probe(Trainer), probe=config))  # type: ignore[call-arg]


def _frozen(aligned: AlignedModel, case: Case, seed: int) -> Training:
    layers = aligned.safety_layers
    return Training(callbacks=(FreezeSafetyLayers(layers),), prepare=lambda model: freeze_layers(model, layers))


def _projected(aligned: AlignedModel, case: Case, seed: int) -> Training:
    return Training(callbacks=(ProjectedTraining(profile=aligned.profile, strength=PROJECTION),))


DEFENCES: Final[Mapping[str, Defence]] = MappingProxyType(
    {
        "mixture": _mixture,
        "refusal_mix": _refusals,
        "derta": _derta,
        "sap": _probe,
        "sppft": _frozen,
        "projected": _projected,
    }
)
"""Ways to fine-tune a case by name: safety data mixed in, benign prompts refused, DeRTa's rows, safety-aware probing,
safety layers frozen, the delta projected after each step."""
