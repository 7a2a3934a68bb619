"""What a safety profile was made from."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from safedelta_hf.records.sorting import TaskSorting


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Ordinary data whose behaviour a profile protects beside the refusals.

    Attributes:
        data: Digest of the tokenised data.
        sequences: Number of its sequences.
        tokens: Number of their tokens.
        weight: Weight of its Hessians.
    """

    data: str
    sequences: int
    tokens: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class ProfileHeader:
    """What a safety profile was made from.

    Attributes:
        architecture: Class name of the model.
        name: Its repository on the Hub, if it was loaded from there.
        revision: Commit of that repository, if it is known.
        base: Digest of each parameter of the base model, by canonical name.
        dtypes: Data type of each parameter, by canonical name, such as "bfloat16".
        tokenizer: Digest of the tokenizer, or None if the safety data came tokenised.
        data: Digest of the tokenised safety data.
        sequences: Number of safety sequences behind the moments.
        tokens: Number of their tokens.
        skipped: Parameters that no supported layer uses, with the reason.
        retention: Ordinary data that is protected too, if any.
        parametrised: Names of the parameters that a weight is computed from, by its canonical name.
        packed: Names of the quantised parameters, whose digests are those of their packed data.
        sorting: Which examples the base would refuse and which were left out, of task data that was sorted.
        format_version: Version of the layout on disk.
    """

    architecture: str
    name: str | None = None
    revision: str | None = None
    base: Mapping[str, str]
    dtypes: Mapping[str, str]
    tokenizer: str | None
    data: str
    sequences: int
    tokens: int
    skipped: Mapping[str, str]
    retention: Retention | None = None
    parametrised: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packed: tuple[str, ...] = ()
    sorting: TaskSorting | None = None
    format_version: int = 6

    @property
    def model(self) -> str:
        """What to call the base in messages."""
        return self.architecture if self.name is None else f"{self.name} ({self.architecture})"

    @property
    def address(self) -> str:
        """Repository and commit of the base on the Hub, as far as they are known."""
        return "@".join(filter(None, (self.name, self.revision)))

    @property
    def digest(self) -> str:
        """One digest of all base weights."""
        return digest_of(self.base)


def digest_of(digests: Mapping[str, str]) -> str:
    """One digest of many named ones.

    Args:
        digests: Digests by name.

    Returns:
        SHA-256 over names and digests, in the order of the names.
    """
    return hashlib.sha256("".join(f"{name}{value}" for name, value in sorted(digests.items())).encode()).hexdigest()
