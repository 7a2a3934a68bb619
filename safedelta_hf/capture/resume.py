"""Reading safety data in parts, so that a killed run need not read again what it has summed."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from safedelta_hf.capture.config import ProfileConfig
from safedelta_hf.capture.reading import Capture
from safedelta_hf.capture.uses import in_order
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.batches import batches_of_equal_length
from safedelta_hf.data.dataset import SafetySequence, digest_of
from safedelta_hf.errors import CaptureError, ConfigurationError, ProfileError
from safedelta_hf.profile.moments import SummedMoments
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.profile.storage import MomentStorage

Read = Callable[[Sequence[SafetySequence]], Capture]


@dataclass(frozen=True)
class Checkpointing:
    """Data is read in parts, and what is summed is kept after each, so that a killed run need not read it again.

    Attributes:
        folder: Where the sum of the parts read so far is kept, as a profile; a run that is made from the same goes on
            from there.
        every: Forward passes in each part.

    Raises:
        ConfigurationError: That is no number of passes.
    """

    folder: str | Path
    every: int

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise ConfigurationError(f"every={self.every!r} must be a whole number of forward passes of at least 1")

    def capture(
        self, sequences: Sequence[SafetySequence], config: ProfileConfig, read: Read, made_of: Mapping[str, Any]
    ) -> Capture:
        """Read the parts that are not summed yet.

        Each part is summed on its own and added to the sum of those before it, so a run that was killed ends with the
        same moments as one that was not, bit for bit. Those of a single pass differ by rounding.

        Args:
            sequences: Tokenised safety data.
            config: How they are read.
            read: Makes one pass over some sequences.
            made_of: Fields of the profile's header that say what the moments are made of, beside the data.

        Returns:
            The sum, with its moments on disk in the folder.

        Raises:
            CaptureError: Layers shared their inputs in one part and not in another.
        """  # noqa: DOC502 - raised by `_added`
        batches = list(batches_of_equal_length(sequences, config.batch_size))
        parts = [
            list(itertools.chain.from_iterable(batches[start : start + self.every]))
            for start in range(0, len(batches), self.every)
        ]
        how = [config.batch_size, config.share_moments, repr(config.chosen), self.every]
        given = json.dumps([digest_of(sequences), how, made_of], sort_keys=True)
        identity = hashlib.sha256(given.encode()).hexdigest()[:16]
        done, total = self._found(identity, len(parts))
        for number in tqdm(range(done + 1, len(parts) + 1), desc="Parts", unit="part", initial=done, total=len(parts)):
            found = _as_profile(read(parts[number - 1]), parts[number - 1], made_of)
            folder = Path(self.folder) / f"{identity}-{number:05d}"
            (found if total is None else _added(total, found)).save(folder, "float32")
            total = SafetyProfile.load(folder)
            shutil.rmtree(Path(self.folder) / f"{identity}-{number - 1:05d}", ignore_errors=True)
        assert total is not None, "there are sequences, so there are parts"
        return Capture(
            uses=total.uses,
            moments=total.moments,
            skipped=total.header.skipped,
            parametrised=total.header.parametrised,
            storage=MomentStorage(),
        )

    def _found(self, identity: str, parts: int) -> tuple[int, SafetyProfile | None]:
        for number in range(parts, 0, -1):
            folder = Path(self.folder) / f"{identity}-{number:05d}"
            if not folder.exists():
                continue
            try:
                total = SafetyProfile.load(folder)
                for key in total.moments:
                    total.moments[key]  # reading checks
            except ProfileError:
                shutil.rmtree(folder)  # damaged since it was written
                continue
            return number, total
        return 0, None


def _as_profile(capture: Capture, part: Sequence[SafetySequence], made_of: Mapping[str, Any]) -> SafetyProfile:
    tokens = sum(len(sequence.input_ids) for sequence in part)
    return capture.profile(data=digest_of(part), sequences=len(part), tokens=tokens, **made_of)


def _added(one: SafetyProfile, other: SafetyProfile) -> SafetyProfile:
    _require_same_sharing(one, other)
    new = [use for use in other.uses if one.key_of(use) is None]
    uses = in_order((*one.uses, *new), tuple(one.header.base))
    header = replace(
        one.header,
        data=other.header.data,
        sequences=one.header.sequences + other.header.sequences,
        tokens=one.header.tokens + other.header.tokens,
        skipped={name: why for name, why in one.header.skipped.items() if name in other.header.skipped},
        parametrised={**one.header.parametrised, **other.header.parametrised},
    )
    twins = dict(zip(other.moments, other.moments, strict=True))
    moments = SummedMoments(one.moments, other.moments, twins, partial(_joined, header.sequences))
    return SafetyProfile(header=header, uses=tuple(uses), moments=moments)


def _joined(sequences: int, one: InputMoment | None, other: InputMoment | None) -> InputMoment:
    found = [moment for moment in (one, other) if moment is not None]
    return replace(found[0] if len(found) == 1 else found[0].merge(found[1]), sequences=sequences)


def _require_same_sharing(one: SafetyProfile, other: SafetyProfile) -> None:
    # A use that only one of them knows must have a moment that only that one knows.
    for here, there in ((one, other), (other, one)):
        for use in here.uses:
            twin = there.key_of(use)
            if twin != use.moment and (twin is not None or use.moment in there.moments):
                raise CaptureError(
                    f"{use.parameter}: it shares its inputs with other layers in some parts of the data and not in "
                    "others; pass share_moments=False"
                )
