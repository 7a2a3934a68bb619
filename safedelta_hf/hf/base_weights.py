"""Which weights are the base of a training run. Never a guess: what cannot be known is an error."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerState

from safedelta_hf.data.dataset import tokenizer_digest
from safedelta_hf.data.templates import ProcessingClass
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import BaseWeightsError, ProfileError, warn
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.header import digest_of
from safedelta_hf.weights.digest import digest_of_held, fingerprint, parameter_digest
from safedelta_hf.weights.readers import FilesOrCopies, FilesReader, WeightReader, open_base

STATE_KEY = "safedelta_base"
"""Key in the Trainer state, and so in every checkpoint; no class has this name, so no callback is restored from it."""

TRAINER_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, kw_only=True)
class RunBase:
    """The base of a training run.

    Attributes:
        weights: Reader of the base weights.
        digests: Digest of each base weight in the dtype of the model.
        moved: Names of the parameters whose weights at train start are not the base's, as after a resume.
    """

    weights: WeightReader
    digests: Mapping[str, str]
    moved: tuple[str, ...]

    @property
    def digest(self) -> str:
        """One digest of all weights."""
        return digest_of(self.digests)


def base_of_run(
    model: ShardedModel, state: TrainerState, given: nn.Module | str | Path | None, output_dir: Path
) -> RunBase:
    """Find the base at the start of a training run.

    A run that starts at step 0 has its base in the model, unless another is given, and so has every run that trains an
    adapter. Another resumed run has its base in the files that the first run recorded in its checkpoints, or where it
    is given.

    Args:
        model: The model as training finds it.
        state: The Trainer's state.
        given: What the user passed as `base`.
        output_dir: Where the Trainer writes; files there are not relied on.

    Returns:
        The base of the run.

    Raises:
        BaseWeightsError: The base cannot be known, or is not the one that the run started from.
    """
    if given is not None:
        run = _from_source(model, given)
    elif state.global_step == 0 or getattr(model.model, "peft_config", None):
        run = _from_model(model, output_dir)
    else:
        run = _from_source(model, **_recorded_files(state))
    require_recorded(run, state)
    return run


def require_recorded(run: RunBase, state: TrainerState) -> None:
    """Make sure that a resumed run has the base that its checkpoint names, if it names one.

    Args:
        run: The base.
        state: The Trainer's state.

    Raises:
        BaseWeightsError: The checkpoint was trained from another base.
    """
    record = _record(state)
    if record is not None and run.digest != record["digest"]:
        raise BaseWeightsError(
            f"base: {run.weights.source} is not the base that the resumed run started from; pass base=<that model>"
        )


def warn_of_other_data(profile: SafetyProfile, state: TrainerState) -> None:
    """Warn if a resumed run has other safety data than it began with.

    Args:
        profile: The profile of the run.
        state: The Trainer's state.
    """
    begun_with = (_record(state) or {}).get("data")
    if begun_with and begun_with != profile.header.data and Ranks.of_run().is_main:
        warn(
            "SafeDeltaCallback: the resumed run began with other safety data, or with the same in another order or "
            f"tokenisation (fingerprint {begun_with[:12]}, now {profile.header.data[:12] or 'none'}); it is adjusted "
            "by those that are given now"
        )


def remember(run: RunBase, state: TrainerState, data: str) -> None:
    """Enter base and safety data into the Trainer's state, so that every checkpoint names them, and who the run is.

    Args:
        run: The base of the run.
        state: Changed in place.
        data: Fingerprint of its safety data.
    """
    weights = run.weights.files if isinstance(run.weights, FilesOrCopies) else run.weights
    files: dict[str, str | None] = {"source": None, "revision": None}
    if isinstance(weights, FilesReader):
        files = {"source": weights.source, "revision": weights.revision}
    name = name_of_run(state) or Ranks.of_run().broadcast(secrets.token_hex(16), owner=0)
    _exported(state)[STATE_KEY] = {"run": name, "digest": run.digest, "data": data, **files}


def name_of_run(state: TrainerState) -> str | None:
    """What a run and those that resume it have in common, and no other.

    Args:
        state: Of the Trainer.

    Returns:
        The name; None if the run was not entered into the state yet.
    """
    return (_record(state) or {}).get("run")


def _recorded_files(state: TrainerState) -> dict[str, Any]:
    record = _record(state)
    if record is None:
        raise BaseWeightsError(
            f"resumed at step {state.global_step} from a checkpoint that was trained without this callback, so its "
            "weights are not the base; pass base=<folder or model that the fine-tuning started from>"
        )
    if record["source"] is None:
        raise BaseWeightsError(
            f"resumed at step {state.global_step}: the base weights were in no file when the run started, and the "
            "copy in memory is gone; pass base=<the model that the fine-tuning started from>"
        )
    return {"source": record["source"], "revision": record["revision"]}


def _record(state: TrainerState) -> dict[str, Any] | None:
    record: dict[str, Any] | None = _exported(state).get(STATE_KEY)
    return record


def _exported(state: TrainerState) -> dict[str, Any]:
    # A dictionary once the state is built, whatever its annotation says.
    exported: Any = state.stateful_callbacks
    return cast(dict[str, Any], exported)


def require_matching(profile: SafetyProfile, run: RunBase, processing_class: ProcessingClass | None) -> None:
    """Make sure that a given profile was made of this base, with this tokenizer.

    Args:
        profile: The profile.
        run: The base of the run.
        processing_class: Tokenizer or processor of the run, or None if there is none.

    Raises:
        ProfileError: It was made of something else.
    """
    found = tokenizer_digest(processing_class)
    if profile.header.tokenizer is not None and found is not None and found != profile.header.tokenizer:
        raise ProfileError("profile: made with another tokenizer or chat template; collect it with this model's own")
    base = profile.header.base
    if strangers := sorted(set(base) ^ set(run.digests)):
        raise ProfileError(
            f"profile: made for another base, {profile.header.model} with {len(base)} parameters; the one that is "
            f"fine-tuned has {len(run.digests)}, and they differ in {', '.join(strangers[:3])}. Collect a profile of it"
        )
    if other := [name for name, digest in run.digests.items() if digest != base[name]]:
        raise ProfileError(
            f"profile: made for another base, {profile.header.model}: {len(other)} of {len(run.digests)} weights "
            f"differ, such as {other[0]}; collect a profile of the model that is fine-tuned, in the same dtype"
        )


def _from_model(model: ShardedModel, output_dir: Path) -> RunBase:
    config = getattr(model.model, "config", None)
    name_or_path = getattr(config, "_name_or_path", "")
    if name_or_path and (Path(name_or_path) / TRAINER_STATE_FILE).exists():
        raise BaseWeightsError(
            f"the model was loaded from {name_or_path!r}, a checkpoint of a Trainer, which is fine-tuned already; pass "
            "base=<the aligned model>, or base=<this folder> if its weights are the aligned ones"
        )
    digests = fingerprint(model)
    revision = getattr(config, "_commit_hash", None)
    weights = FilesOrCopies(model, digests, revision=revision, avoid=output_dir)
    return RunBase(weights=weights, digests=digests, moved=())


def _from_source(model: ShardedModel, source: nn.Module | str | Path, revision: str | None = None) -> RunBase:
    weights = open_base(source, model.model, revision)
    digests, moved = {}, []
    for name in model.names:
        weight = weights.read(name, model.shard(name))
        if weight.shape != model.read(name).shape:
            raise BaseWeightsError(
                f"base: {name} is {list(weight.shape)} in {weights.source} and {list(model.shape(name))} in the "
                "model; pass the model that the fine-tuning started from"
            )
        digests[name] = digest_of_held(weight.to(model.dtype(name)), name, model)
        if digests[name] != parameter_digest(model, name):
            moved.append(name)
    return RunBase(weights=weights, digests=digests, moved=tuple(moved))
