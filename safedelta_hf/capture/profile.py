"""The safety profile: the moments of one base model on one set of safety data, in memory and on disk."""

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safedelta_hf.capture.collect import Capture
from safedelta_hf.capture.held_out import HeldOut
from safedelta_hf.capture.moments import HeldMoments, Moments, MomentsByKey
from safedelta_hf.capture.storage import MomentStorage
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import ProfileError
from safedelta_hf.folders import complete_or_absent
from safedelta_hf.records import Part, ProfileHeader, Retention, Role, Use

HEADER_FILE = "profile.json"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class SafetyProfile:
    """What the safety data needs of each layer of one base model.

    Made by `collect_profile`; usable for every fine-tune of that base.

    Attributes:
        header: What the profile was made from.
        uses: How each covered parameter is used, and the key of its moment.
        moments: `InputMoment` by key, and the shape of each; read from disk one at a time after `load`.
        held_out: Safety data that is in no moment, to measure refusals by; None if nothing was held out.
        storage: What holds the moments of a profile made in this process; offloaded files live as long.
    """

    header: ProfileHeader
    uses: tuple[Use, ...]
    moments: Moments
    held_out: HeldOut | None = None
    storage: MomentStorage | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, capture: Capture, held_out: HeldOut | None = None, **header: Any) -> "SafetyProfile":  # noqa: ANN401
        """Join what a capture found with what it was made from.

        Args:
            capture: Result of one pass over the safety data.
            held_out: Safety data that was not in that pass.
            **header: Fields of `ProfileHeader`, but for `skipped` and `parametrised`.

        Returns:
            The profile, in memory.
        """
        return cls(
            header=ProfileHeader(skipped=dict(capture.skipped), parametrised=dict(capture.parametrised), **header),
            uses=capture.uses,
            moments=capture.moments if isinstance(capture.moments, Moments) else HeldMoments(capture.moments),
            held_out=held_out,
            storage=capture.storage,
        )

    def key_of(self, use: Use) -> str | None:
        """Key of the moment of a use, be it of another profile of the same base.

        Args:
            use: The use; its own key is not looked at.

        Returns:
            The key in this profile, or None if its data never reached that use.
        """
        return self._keys.get(replace(use, moment=""))

    @cached_property
    def _keys(self) -> dict[Use, str]:
        return {replace(use, moment=""): use.moment for use in self.uses}

    def save(self, folder: str | Path) -> None:
        """Write a folder of `profile.json` and one safetensors file per moment; complete or not there at all.

        Args:
            folder: A folder that does not exist yet.

        Raises:
            ProfileError: The folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise ProfileError(f"profile: {str(folder)!r} exists already; remove it or choose another name")
        with complete_or_absent(folder) as unfinished:
            described = []
            for number, (key, moment) in enumerate(self.moments.items()):
                file = f"moment-{number:05d}.safetensors"
                save_file({"total": moment.total.contiguous()}, unfinished / file)
                described.append({"key": key, "file": file, "sequences": moment.sequences, "tokens": moment.tokens})
            content = {
                "header": asdict(self.header),
                "uses": [asdict(use) for use in self.uses],
                "moments": described,
                "held_out": None if self.held_out is None else asdict(self.held_out),
            }
            (unfinished / HEADER_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "SafetyProfile":
        """Open a saved profile; moments are read when they are asked for.

        Args:
            folder: A folder that `save` wrote.

        Returns:
            The profile.

        Raises:
            ProfileError: The folder is no profile, is of another format version, or is malformed.
        """
        folder = Path(folder)
        path = folder / HEADER_FILE
        if not path.is_file():
            raise ProfileError(f"profile: {str(folder)!r} holds no {HEADER_FILE}; is it a folder that save() wrote?")
        try:
            profile = _parse(json.loads(path.read_text(encoding="utf-8")), folder)
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"profile: {str(path)!r} is malformed ({error!r}); collect it again") from error
        unknown = sorted({use.moment for use in profile.uses} - set(profile.moments))
        if unknown:
            raise ProfileError(f"profile: {str(path)!r} names moments that it does not hold, such as {unknown[0]!r}")
        return profile


def _parse(content: Any, folder: Path) -> SafetyProfile:  # noqa: ANN401 - JSON
    version = content["header"]["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version!r}, this package reads {FORMAT_VERSION}")
    header, held_out = content["header"], content["held_out"]
    retention = None if header["retention"] is None else Retention(**header["retention"])
    parametrised = {name: tuple(originals) for name, originals in header.get("parametrised", {}).items()}
    uses = (
        Use(
            parameter=use["parameter"],
            role=Role(use["role"]),
            moment=use["moment"],
            part=None if use["part"] is None else Part(**use["part"]),
        )
        for use in content["uses"]
    )
    return SafetyProfile(
        header=ProfileHeader(**{**header, "retention": retention, "parametrised": parametrised}),
        uses=tuple(uses),
        held_out=None if held_out is None else HeldOut.parse(held_out),
        moments=_MomentFiles(folder, {entry["key"]: entry for entry in content["moments"]}),
    )


class _MomentFiles(MomentsByKey):
    """Moments on disk, read one at a time."""

    def __init__(self, folder: Path, entries: dict[str, dict[str, Any]]) -> None:
        super().__init__(entries)
        self._folder = folder
        self._entries = entries
        for key, entry in entries.items():
            if Path(entry["file"]).name != entry["file"]:
                raise ValueError(f"the file of {key!r} lies outside the folder: {entry['file']!r}")

    def __getitem__(self, key: str) -> InputMoment:
        entry = self._entries[key]
        return InputMoment(
            total=self._read(self._folder / entry["file"]), sequences=entry["sequences"], tokens=entry["tokens"]
        )

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self[key].total.shape)

    @staticmethod
    def _read(path: Path) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                total: Tensor = file.get_tensor("total")
                return total
        except (OSError, SafetensorError) as error:
            raise ProfileError(f"profile: cannot read {str(path)!r} ({error}); collect the profile again") from error
