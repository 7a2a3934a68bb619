"""What is read with the base model at the start of a run: safety data, ordinary data, task data."""

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from safedelta_hf.capture.collect import DEFAULT_HOLDOUT, FEWEST_HELD_OUT_OF, collect_profile
from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.without_data import profile_without_data
from safedelta_hf.data.dataset import Source, require_source
from safedelta_hf.data.forms import is_tokenised
from safedelta_hf.data.openings import divided
from safedelta_hf.data.phrases import SAFETY_DATA
from safedelta_hf.data.refusals import HeldOut, is_language_model
from safedelta_hf.data.rows import kept
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ConfigurationError, DataError, NothingLeftError, require_kind, warn
from safedelta_hf.profile.profile import SafetyProfile, with_ordinary
from safedelta_hf.rules.rule import Rule, require_number

logger = logging.get_logger(__name__)

SEEN = 4096
"""Rows of the training data that are compared with the refusals that were held out, at most."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data behind the profiles of a run.

    Attributes:
        owner: What has the data, for errors.
        safety: Harmful prompts with the responses of a safe model; None if there is a profile of it already, or no
            need.
        ordinary: Ordinary prompts with the base model's responses, to protect them beside the refusals.
        ordinary_weight: Weight of that data's Hessians.
        task: Examples of the fine-tuning data; None for the Trainer's own.
        task_examples: Number of examples to take of the Trainer's own.
        sort_task: Whether examples that the base would refuse are left out of the task.

    Raises:
        ConfigurationError: A value is outside its range.
        DataError: Something is no data.
    """

    owner: str = "SafeDeltaCallback"
    safety: Source | None
    ordinary: Source | None = None
    ordinary_weight: float = 0.1
    task: Source | None = None
    task_examples: int = 256
    sort_task: bool = True

    def __post_init__(self) -> None:
        if type(self.task_examples) is not int or self.task_examples < 1:
            raise ConfigurationError(f"task_examples={self.task_examples!r} must be a whole number of at least 1")
        weight, owner = self.ordinary_weight, self.owner
        require_kind(owner, "sort_task", self.sort_task, bool, "True or False")
        require_number(owner, "ordinary_weight", weight, "positive and finite", lambda value: 0 < value < math.inf)
        for name in ("safety", "ordinary", "task"):
            # An iterator would be empty for the second model of a sweep.
            object.__setattr__(self, name, kept(getattr(self, name)))
            if getattr(self, name) is not None:
                require_source(owner, f"{name}_dataset", getattr(self, name))

    def require_enough(self) -> None:
        """Make sure that there is enough safety data to hold some of it out.

        Raises:
            DataError: There is not.
        """
        found = None if self.safety is None else require_source(self.owner, "safety_dataset", self.safety)
        if found is not None and found < FEWEST_HELD_OUT_OF:
            raise DataError(
                f"{self.owner}: give at least {FEWEST_HELD_OUT_OF} refusals (you gave {found}): a part of them is "
                "held out, for the strength to be measured by. With fewer, give a rule whose strength is a number, "
                "such as rule=Ridge(strength=1.0), or config=ProfileConfig(holdout=0.25)"
            )


def require_use(
    data: RunData,
    rule: Rule,
    *,
    profile: object,
    task_profile: object = None,
    is_polished: bool = False,
) -> None:
    """Make sure that safety data are given once, if the rule needs them, and that whatever is given has an effect.

    Args:
        data: The data of the run.
        rule: Which part of each delta will be kept.
        profile: What was given as a safety profile made before, if anything.
        task_profile: The same of the task data.
        is_polished: Whether the model is polished too, which reads data whatever profiles there are.

    Raises:
        ConfigurationError: It is not so.
    """
    owner, safety = data.owner, data.safety
    has_none, has_both = safety is None and profile is None, safety is not None and profile is not None
    if (has_none and (rule.needs_safety_data or is_polished)) or (has_both and not is_polished):
        raise ConfigurationError(
            f"{owner}: give either safety_dataset or profile (--safety-data FILE of harmful prompts with refusals, or "
            "--profile FOLDER)"
        )
    if data.ordinary is not None and safety is None:
        why = "without safety_dataset" if profile is None else "beside a profile made before"
        raise ConfigurationError(f"{owner}: ordinary_dataset has no effect {why}")
    if data.task is not None and task_profile is not None:
        raise ConfigurationError(f"{owner}: give either task_dataset or task_profile")
    if (data.task is not None or task_profile is not None) and not rule.needs_task and not is_polished:
        raise ConfigurationError(f"{owner}: {rule.name} does not weigh the task; leave out the task data")


def require_config_used(data: RunData, config: ProfileConfig | None, *, reads_data: bool, is_polished: bool) -> None:
    """Make sure that how data is to be read has an effect, if it was given.

    Args:
        data: The data of the run.
        config: What was given; None for nothing.
        reads_data: Whether any data is read, or a base described without.
        is_polished: Whether the model is polished too.

    Raises:
        ConfigurationError: It has none, or its `holdout` has none.
    """
    if config is None:
        return
    if not reads_data:
        raise ConfigurationError(
            f"{data.owner}: config has no effect where no data is read, and a profile made before was read in its own "
            "way; leave it out, or give safety_dataset instead of profile"
        )
    if config.holdout is not None and data.safety is None and not is_polished:
        raise ConfigurationError(
            f"{data.owner}: config=ProfileConfig(holdout={config.holdout:g}) has no effect without safety_dataset, of "
            "which it is a share; leave it out"
        )


@dataclass(frozen=True, kw_only=True)
class ProfileCollector:
    """Collects profiles of one base model.

    Attributes:
        model: The model, holding the base weights.
        processing_class: Tokenizer or processor.
        digests: Digest of each of its parameters.
        config: How data is read.
        is_measured: Whether the strength is, so that safety data has to be held out.
        progress: Whether to show progress bars.
    """

    model: ShardedModel
    processing_class: ProcessingClass | None
    digests: Mapping[str, str]
    config: ProfileConfig
    is_measured: bool
    progress: bool

    def safety(self, data: RunData) -> SafetyProfile:
        """The profile that protects the refusals, and ordinary behaviour if there is data for it.

        Args:
            data: The data of the run.

        Returns:
            The profile; one without moments where there is no safety data, as the rule needs none.
        """
        if data.safety is None:
            return profile_without_data(self.model, self.digests, self.config)
        holdout = self.config.holdout
        if self.is_measured and holdout is None:
            holdout = DEFAULT_HOLDOUT
        profile = self._collect(data.safety, SAFETY_DATA, holdout=holdout)
        if data.ordinary is None:
            return profile
        return with_ordinary(profile, self._collect(data.ordinary, "ordinary data"), data.ordinary_weight)

    def task(self, data: RunData, train_dataset: Any, profile: SafetyProfile) -> SafetyProfile:  # noqa: ANN401
        """The profile of the fine-tuning data.

        Args:
            data: The data of the run.
            train_dataset: The Trainer's own data set, map-style or iterable.
            profile: The safety profile of the run.

        Returns:
            The profile.

        Raises:
            NothingLeftError: The base would refuse all of it.
            DataError: The data cannot be read.
        """
        sorted_by = self._refusals(data, profile) if data.sort_task else None
        try:
            source = task_examples(data, train_dataset, data.task_examples)
            return self._collect(source, "task data", sorted_by=sorted_by)
        except DataError as error:
            if data.task is not None or isinstance(error, NothingLeftError):
                raise
            raise DataError(
                f"{error}. It was drawn from the Trainer's data set; pass task_dataset=<examples with responses>, or "
                "a rule that does not weigh the task, such as Ridge()"
            ) from error

    def _refusals(self, data: RunData, profile: SafetyProfile) -> Source | SafetyProfile | None:
        if not is_language_model(self.model.model):
            return None  # it refuses nothing
        if data.safety is None and profile.held_out is None:
            logger.warning(
                "Safe Delta: the profile holds no refusals out, so the task is not sorted by what the base refuses; "
                "collect the profile with ProfileConfig(holdout=0.25) of refusals."
            )
            return None
        return profile if data.safety is None else data.safety

    def _collect(
        self,
        source: Source,
        purpose: str,
        holdout: float | None = 0.0,
        sorted_by: Source | SafetyProfile | None = None,
    ) -> SafetyProfile:
        return collect_profile(
            self.model,
            source,
            self.processing_class,
            config=replace(self.config, holdout=holdout),
            digests=self.digests,
            progress=self.progress,
            purpose=purpose,
            sorted_by=sorted_by,
        )


def warn_of_trained_refusals(held_out: HeldOut, train_dataset: Any) -> None:  # noqa: ANN401 - whatever a Trainer takes
    """Warn where refusals that the strength is measured by are trained on as well.

    They are remembered, whatever becomes of others: the strength comes out too mild, be it 0. At most `SEEN` rows are
    looked at, of a list or of a Dataset with `input_ids`; other data cost more to look at.

    Args:
        held_out: Refusals that were held out.
        train_dataset: The Trainer's own data set.
    """
    if not isinstance(train_dataset, list | tuple) and "input_ids" not in (
        getattr(train_dataset, "column_names", None) or ()
    ):
        return
    parts = [divided(sequence) for sequence in held_out.sequences]
    prompts = {prompt for prompt, _ in filter(None, parts)}
    sizes, trained = sorted(set(map(len, prompts))), set[tuple[int, ...]]()
    for row in examples_of(train_dataset, SEEN):
        if is_tokenised(row) and row.get("input_ids") is not None:
            mask = row.get("attention_mask")
            tokens = tuple(itertools.compress(row["input_ids"], itertools.repeat(1) if mask is None else mask))
            trained |= prompts.intersection(tokens[:size] for size in sizes)
    number = sum(part is not None and part[0] in trained for part in parts)
    if number:
        warn(
            f"safety data: {number} of the {len(parts)} refusals that the strength is measured by have prompts that "
            "are in the training data as well. What is trained on is remembered, so the strength may come out too "
            "mild, or as 0, while other harmful requests are answered. Give the callback refusals that are not trained "
            "on, or a rule whose strength is a number"
        )


def task_examples(data: RunData, train_dataset: Any, count: int) -> Source:  # noqa: ANN401 - map-style or iterable
    """The examples that stand for the fine-tuning data.

    Args:
        data: The data of the run.
        train_dataset: The Trainer's own data set.
        count: Number of examples to draw of it, at most.

    Returns:
        Those that were given, else some of the Trainer's own; the same at each call.
    """
    return examples_of(train_dataset, count) if data.task is None else data.task


def examples_of(dataset: Any, count: int) -> list[Mapping[str, Any]]:  # noqa: ANN401 - whatever a Trainer takes
    """Draw examples from a data set; the same at each call.

    Args:
        dataset: With length and items, or iterable alone: then its first examples are taken.
        count: Number of examples, at most.

    Returns:
        The examples.

    Raises:
        DataError: There is no data set, or it can be iterated over only once.
    """
    if dataset is None:
        raise DataError("task data: the Trainer has no training data")
    if has_length(dataset) and not isinstance(dataset, IterableDataset):  # which has an item of no number
        items: Any = dataset
        chosen = random.Random(0).sample(range(len(dataset)), min(count, len(dataset)))
        return [items[number] for number in sorted(chosen)]
    _require_again(dataset)
    return list(itertools.islice(iter(dataset), count))


def _require_again(dataset: Any) -> None:  # noqa: ANN401
    # What is drawn of a stream that does not begin again is lost to the training. Shards wrap the stream.
    while dataset is not None:
        if not has_length(dataset) and iter(dataset) is iter(dataset):
            raise DataError(
                f"the Trainer's data set ({type(dataset).__name__}) can be iterated over only once, so examples drawn "
                "from it would be missing from the training"
            )
        dataset = getattr(dataset, "dataset", None)
