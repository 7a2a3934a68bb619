"""Adjust a saved adapter, files to files, without its base model."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from safedelta_hf.adapter.store import AdapterInFiles
from safedelta_hf.adjust.loop import adjust_weights
from safedelta_hf.adjust.plan import plan_parameters, require_number
from safedelta_hf.adjust.settings import opened_settings
from safedelta_hf.capture.without_data import base_without_data, digested, profile_without_data
from safedelta_hf.deltas.lora_folder import AdapterFolder, LoraTensors
from safedelta_hf.deltas.lora_settings import initialised_from_base
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import (
    AdapterError,
    BaseWeightsError,
    CheckpointError,
    ProfileError,
    naming_foreign_errors,
    require_kind,
)
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.plan import Treatment
from safedelta_hf.records.uses import inputs_first
from safedelta_hf.report import Report
from safedelta_hf.rules import Rule, rule_of
from safedelta_hf.weights.digest import fingerprint
from safedelta_hf.weights.readers import FilesReader, ModelReader, WeightReader, compared, tied_aliases, verified
from safedelta_hf.weights.safetensors_files import SafetensorsFiles


@naming_foreign_errors("adjusting the adapter", "nothing was written")
def adjust_adapter_files(
    adapter: str | Path,
    *,
    output: str | Path,
    profile: SafetyProfile | str | Path | None = None,
    rule: Rule | str | None = None,
    task_profile: SafetyProfile | str | Path | None = None,
    base: nn.Module | str | Path | None = None,
    initial_adapter: str | Path | None = None,
    treatment: Treatment | None = None,
    progress: bool = True,
) -> Report:
    """Adjust a LoRA adapter that PEFT saved, and write it as PEFT would: the same keys, types and configuration.

    Every tuned parameter has to be one of the profile's, in its shape, and the base of the adapter the one that the
    profile was made of: where its files can be read, every weight is compared, else the names that adapter and profile
    give it. Where neither tells, the report says so (`Report.unverified`).

    Args:
        adapter: Folder of the adapter.
        output: Folder to write; must not exist.
        profile: Profile of its base, or the folder of one; None for a rule that needs no safety data, such as
            `Scale(strength=1.0)`, and then the files of the base have to be there.
        rule: Which part of each delta to keep, at a strength that is a number, so it has to be given: the default,
            `TaskRidge()` with `task_profile` and else `Ridge()`, is measured. A name stands for that rule as it is by
            default.
        task_profile: Profile of the same base on examples of the fine-tuning data, for rules that weigh them; or the
            folder of one.
        base: The base model, or its folder or cached repository, read one weight at a time; the one that the adapter
            names if None, which need not be there unless the adapter carries parameters whole (`modules_to_save`,
            `trainable_token_indices`, `bias`).
        initial_adapter: Folder of the adapter before training, if its initialisation took a part of the base weights
            with it (PiSSA, OLoRA, CorDA, LoRA-GA). The result has twice the rank and belongs on the original base.
        treatment: What to do with tuned parameters other than linear weights.
        progress: Whether to show progress bars.

    Returns:
        What was done to each parameter that the adapter tunes.

    Raises:
        ConfigurationError: The strength is to be measured.
        AdapterError: The folder cannot be read or has no delta `s B A`, or the output exists.
        BaseWeightsError: The base that was given cannot be read.
        ProfileError: The profile was made of another base.
        SafeDeltaError: Named by parameter. Whatever was raised, the adapter is as it was and there is no output.
    """
    for name, value in (("adapter", adapter), ("output", output)):
        require_kind("adjust_adapter_files", name, value, (str, Path), "a folder")
    require_kind("adjust_adapter_files", "initial_adapter", initial_adapter, (str, Path, type(None)), "a folder")
    require_kind("adjust_adapter_files", "base", base, (nn.Module, str, Path, type(None)), "a model, or its folder")
    if Path(output).exists():
        raise AdapterError(f"output: {str(output)!r} exists already; remove it or choose another folder")
    require_number(rule_of("adjust_adapter_files", rule, task_profile))
    folder = opened_adapter(adapter, initial_adapter)
    settings = opened_settings(
        "adjust_adapter_files",
        profile,
        rule,
        task_profile,
        treatment,
        without_data=lambda: _without_data(base, folder, progress=progress),
    )
    profile, rule, task = settings.profile, settings.rule, settings.task
    reader = _Base(base, folder, profile, progress=progress)
    shapes = {use.parameter: use.shape for use in profile.uses}
    store = AdapterInFiles(
        list(LoraTensors(folder, profile.header, inputs_first(profile.uses), reader.read, shapes)),
        partial(folder.write, Path(output)),
        architecture=profile.header.architecture,
        source=reader.source,
        unverified=reader.unverified,
    )
    plan = plan_parameters(store.shapes, profile, treatment or Treatment())
    return adjust_weights(store, plan, profile, rule, task=task, progress=progress)


def opened_adapter(adapter: str | Path, initial_adapter: str | Path | None) -> AdapterFolder:
    """Open a saved adapter as one on the original base.

    Args:
        adapter: Its folder.
        initial_adapter: Folder of the adapter before training, if its initialisation took a part of the base with it.

    Returns:
        The adapter; of twice the rank where it was initialised from the base.

    Raises:
        AdapterError: The folder cannot be read or has no delta `s B A`, or what it was before training is missing.
    """
    folder = AdapterFolder(adapter)
    if initial_adapter is not None:
        folder.subtract(AdapterFolder(initial_adapter))
    elif initialised_from_base(folder.config):
        raise AdapterError(
            f"adapter: init_lora_weights={folder.config.init_lora_weights!r} took a part of the base into the adapter, "
            "so its delta is relative to what it started from; pass initial_adapter=<the adapter as save_pretrained "
            "wrote it right after get_peft_model> (--initial-adapter on the command line)"
        )
    return folder


def _without_data(base: nn.Module | str | Path | None, adapter: AdapterFolder, *, progress: bool) -> SafetyProfile:
    if isinstance(base, nn.Module):
        opened = open_model(base)
        return profile_without_data(opened, fingerprint(opened))
    named = base or adapter.config.base_model_name_or_path
    try:
        files = SafetensorsFiles(str(named), adapter.config.revision if base is None else None)
    except CheckpointError as error:
        raise BaseWeightsError(
            f"base: {named!r} cannot be read ({error}), and without a profile nothing else tells the weights that the "
            "adapter is on; pass base=<folder of the base model> (--base on the command line), or a profile of it"
        ) from error
    profile, reader = base_without_data(files)
    return digested(profile, reader, progress=progress)


class _Base:
    """The base of a saved adapter: compared with the profile, and read where the adapter carries parameters whole."""

    def __init__(
        self, given: nn.Module | str | Path | None, adapter: AdapterFolder, profile: SafetyProfile, *, progress: bool
    ) -> None:
        self._given = given
        self._named = adapter.config.base_model_name_or_path
        self._revision = adapter.config.revision
        self._header = profile.header
        self._opened: WeightReader | None = None
        self._failure: BaseWeightsError | None = None
        self._open()
        # Where no data was read, the base itself was.
        is_known = not profile.is_read or self._is_profiles(progress)
        self.unverified = "" if is_known else adapter.doubt(profile.header)

    @property
    def source(self) -> str:
        """Where the base weights are, for the report."""
        return self._opened.source if self._opened is not None else str(self._named or "the base of the profile")

    def read(self, name: str) -> Tensor:
        if name not in self._header.base:
            raise AdapterError(f"{name}: not a parameter of the {self._header.architecture} of the profile")
        if self._opened is None:
            raise BaseWeightsError(
                f"{name}: the adapter carries it whole, so its base value is needed, and {self._named!r} cannot be "
                f"read ({self._failure}); pass base=<folder of the base model> (--base on the command line)"
            ) from self._failure
        weight = verified(self._opened, name, self._header.dtypes[name], self._header.base[name])
        return weight.to(getattr(torch, self._header.dtypes[name]))

    def _open(self) -> None:
        if isinstance(self._given, nn.Module):
            self._opened = ModelReader(self._given)
        elif self._given is not None:
            self._opened = FilesReader(self._given, tied_aliases(self._header))
        elif self._named:
            try:
                self._opened = FilesReader(self._named, tied_aliases(self._header), self._revision)
            except BaseWeightsError as error:
                self._failure = error

    def _is_profiles(self, progress: bool) -> bool:
        if self._opened is None:
            return False
        found = compared(self._opened, self._header, progress=progress)
        if found.differing is not None:
            raise ProfileError(
                f"profile: made of {self._header.model}, which is not the base of this adapter: {found.differing} in "
                f"{self._opened.source} is another weight; collect a profile of that base, in the same precision, or "
                "pass base=<the model that it was trained on> if that is another (--base on the command line)"
            )
        return found.compared > 0
