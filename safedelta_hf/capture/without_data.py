"""A base that has read no data: what a profile says of it besides moments, enough for rules that read none."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.watched_model import WatchedModel
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import BaseWeightsError, CheckpointError
from safedelta_hf.modules.names import (
    base_modules,
    class_name,
    embeddings,
    hub_name,
    is_hub_name,
    parameter_aliases,
    parameter_names,
    unwrapped,
)
from safedelta_hf.modules.parametrised import parametrised_weights
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.profile.moments import NoMoments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.uses import MatrixView, Role, Use, moment_key
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.weights.digest import digest
from safedelta_hf.weights.readers import WeightReader, tied_aliases
from safedelta_hf.weights.safetensors_files import FLOATING, SafetensorsFiles
from safedelta_hf.weights.stored import StoredWeights, skeleton, stored_in

_BY_MODULE: Final = ((nn.Embedding, Role.EMBEDDING), (Conv1D, Role.CONV1D), (nn.modules.conv._ConvNd, Role.CONVOLUTION))


def profile_without_data(
    model: ShardedModel, digests: Mapping[str, str], config: ProfileConfig | None = None
) -> SafetyProfile:
    """Describe a base in memory.

    Every parameter has a use, in the role that its module and its name give it: also what a profile of data would leave
    out, since no data reached it.

    Args:
        model: The model, or the fine-tuned one, of the same parameters.
        digests: Digest of each parameter of the base, in the data types of this model.
        config: Which linear weights are adjusted; all if None.

    Returns:
        A profile without moments.

    Raises:
        CaptureError: It is an encoder-decoder model.
        NumericalError: A weight holds NaN or Inf.
        ConfigurationError: It is sharded, and has weights that are computed from parameters.
    """
    config = config or ProfileConfig()
    watched = WatchedModel.of(model, config)
    name, revision = hub_name(model.model)
    header = _header(class_name(model.model), digests, name, revision)
    header = replace(
        header,
        dtypes=model.data_types,
        parametrised={one: weight.originals for one, weight in watched.computed.items()},
        packed=tuple(one for one in model.names if is_quantised(model.live(one))),
    )
    shapes = {one: tuple(held.shape) for one, held in watched.matrices.items() if one not in watched.obstacles}
    uses = list(_uses(unwrapped(model.model), shapes))
    untargeted = {use.parameter for use in uses if not use.role.is_diagonal and use.parameter not in watched.chosen}
    reason = f"it is not among the targets ({config.targets!r})"
    skipped = {**watched.obstacles, **dict.fromkeys(sorted(untargeted), reason)}
    return _profile(replace(header, skipped=skipped), (use for use in uses if use.parameter not in untargeted))


def base_without_data(files: SafetensorsFiles) -> tuple[SafetyProfile, StoredWeights]:
    """Describe a base in files, from headers alone.

    Args:
        files: The base.

    Returns:
        A profile without moments, whose digests are empty until `digested` has read the weights; and their reader.

    Raises:
        BaseWeightsError: What its parameters are cannot be told from the files.
    """
    try:
        model = skeleton(files, _architecture(files), len(files.tensors))
        snapshot = None if files.config is None else files.config.parent
        is_cached = snapshot is not None and snapshot.parent.name == "snapshots"
        header = _header(
            class_name(model),
            dict.fromkeys(parameter_names(model).values(), ""),
            files.source if is_hub_name(files.source) else None,
            snapshot.name if snapshot is not None and is_cached else None,
        )
        stored = stored_in(files, header, tied_aliases(header))
        uses = list(_uses(model, {name: one.shape for name, one in stored.items()}))
    except Exception as error:  # whatever transformers makes of a configuration
        told = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise BaseWeightsError(
            f"base: the parameters of {files.source!r} cannot be told from its files ({told}); give a profile of it "
            "(--profile, from `safedelta profile`)"
        ) from error
    dtypes = {name: _dtype(files, one.names[0]) for name, one in stored.items()}
    computed = {name: weight.originals for name, weight in parametrised_weights(model).items()}
    return _profile(replace(header, dtypes=dtypes, parametrised=computed), uses), StoredWeights(files, stored)


def digested(profile: SafetyProfile, base: WeightReader, *, progress: bool = False) -> SafetyProfile:
    """Give a description of a base in files the digests of its weights, one weight in memory at a time.

    Args:
        profile: From `base_without_data`.
        base: Reads the weights.
        progress: Whether to show a progress bar.

    Returns:
        The same with digests.

    Raises:
        BaseWeightsError: A weight cannot be read.
    """
    names = progress_bar(profile.header.base, desc="Reading the base", unit="weight", disable=not progress)
    return replace(profile, header=replace(profile.header, base={name: digest(base.read(name)) for name in names}))


def _header(architecture: str, digests: Mapping[str, str], name: str | None, revision: str | None) -> ProfileHeader:
    return ProfileHeader(
        architecture=architecture,
        name=name,
        revision=revision,
        base=dict(digests),
        dtypes={},
        tokenizer=None,
        data="",
        sequences=0,
        tokens=0,
        skipped={},
    )


def _profile(header: ProfileHeader, uses: Iterable[Use]) -> SafetyProfile:
    found = tuple(uses)
    shapes = {use.moment: (use.view.columns,) * (1 if use.role.is_diagonal else 2) for use in found}
    return SafetyProfile(header=header, uses=found, moments=NoMoments(shapes))


def _architecture(files: SafetensorsFiles) -> str:
    settings = {} if files.config is None else json.loads(files.config.read_text(encoding="utf-8"))
    named = settings.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise CheckpointError(f"config.json does not say which class it is of (architectures={named!r})")
    return named[0]


def _dtype(files: SafetensorsFiles, name: str) -> str:
    return str(FLOATING[files.tensors[name].dtype]).removeprefix("torch.")


def _uses(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Use]:
    modules = dict(base_modules(model, every_name=True))
    aliases = parameter_aliases(model)
    head = embeddings(model, "output")
    for name, shape in shapes.items():
        found: dict[str, Use] = {}
        for place in (name, *aliases.get(name, ())):
            module, key = modules[place.rpartition(".")[0]], place.rpartition(".")[2]
            is_head = module is head and len(shape) > 1
            role = Role.HEAD if is_head else _role(module, key, shape)
            for view in _views(module, role, shape):
                moment = moment_key(name, role, view, shape)
                found[moment] = Use(parameter=name, role=role, moment=moment, view=view, shape=shape)
        yield from found.values()


def _role(module: nn.Module, key: str, shape: tuple[int, ...]) -> Role:
    if "bias" in key:
        return Role.BIAS
    if len(shape) < 2:
        return Role.SCALE
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and shape[1] == 1:
        return Role.SCALE  # one number for each channel and place
    return next((role for kind, role in _BY_MODULE if isinstance(module, kind)), Role.LINEAR)


def _views(module: nn.Module, role: Role, shape: tuple[int, ...]) -> Iterator[MatrixView]:
    # Three dimensions that no convolution has are a stack of matrices, such as experts.
    if role is not Role.LINEAR or len(shape) != 3:
        yield role.view(shape)
        return
    for start in range(0, math.prod(shape), math.prod(shape[1:])):
        view = MatrixView.contiguous(shape[1], shape[2], start)
        yield view.transposed if getattr(module, "is_transposed", False) else view
