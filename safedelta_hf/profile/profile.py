"""The safety profile: the moments of one base model on one set of safety data, in memory, on disk or on the Hub."""

import math
import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

from safedelta_hf.core.low_rank import total_of
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.data.refusals import HeldOut
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ProfileError, require_kind
from safedelta_hf.profile.encodings import Encoding, encoding_of
from safedelta_hf.profile.files import MomentFiles, in_folder, keys_in_order, read_header, write_profile
from safedelta_hf.profile.header import HEADER_FILE
from safedelta_hf.profile.hub import download, upload, write_card
from safedelta_hf.profile.moments import Moments, MomentStorage, NoMoments, ShardedMoments, SummedMoments
from safedelta_hf.records.header import ProfileHeader, Retention
from safedelta_hf.records.uses import Use
from safedelta_hf.rules.rule import require_number

DEFAULT_STORAGE = "triangular"


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

    @property
    def is_read(self) -> bool:
        """Whether any data was read, so that there are moments."""
        return not isinstance(self.moments, NoMoments)

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

    def save(self, folder: str | Path, storage: str | Encoding = DEFAULT_STORAGE) -> None:
        """Write a folder of `profile.json` and safetensors files; complete or not there at all.

        What is written stands in `.NAME.unfinished` beside the folder until it is complete. If that is interrupted,
        the same call goes on where it stopped, and ends with the same bytes.

        In a run of several processes all of them call this, and the main one writes.

        Args:
            folder: A folder that does not exist yet.
            storage: How moments are stored: "float32", "triangular" (exact, half the size), "bfloat16" or
                "eigenbasis:RANK", or an encoding such as `Eigenbasis(rank=256)`. Diagonal moments are always exact.

        Raises:
            ConfigurationError: There is no such storage.
            OutputError: The folder exists, cannot be written, or another process is writing it.
            ProfileError: A moment is not one, so the profile could not be read again.
            RankError: Another process failed.
        """
        encoding = encoding_of(storage)
        ranks, moments = self._ranks(), self.moments
        with ranks.together():
            if ranks.is_main:
                header, uses, held_out = self.header, self.uses, self.held_out
                read = self._on_main
                write_profile(Path(folder), moments, encoding, read, header=header, uses=uses, held_out=held_out)
            elif isinstance(moments, ShardedMoments):
                for key in keys_in_order(moments, encoding):
                    moments.brought(key, receiver=0)

    def _ranks(self) -> Ranks:
        return self.moments.ranks if isinstance(self.moments, ShardedMoments) else Ranks.of_run()

    def _on_main(self, key: str) -> InputMoment:
        moment = (
            self.moments.brought(key, receiver=0) if isinstance(self.moments, ShardedMoments) else self.moments[key]
        )
        assert moment is not None, "it was brought to this rank"
        return moment

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "SafetyProfile":
        """Open a saved profile; moments are read, or downloaded, when they are asked for.

        Args:
            source: A folder that `save` wrote; if there is none of that name, a repository `organisation/name` on the
                Hub.
            revision: Branch, tag or commit on the Hub.
            token: Access token of the Hub; None for the one that was stored by logging in.
            cache_dir: Where downloads are kept.

        Returns:
            The profile.

        Raises:
            ProfileError: It is no profile, is of another format version, or is malformed.
        """
        folder = Path(source)
        if folder.exists():
            content = read_header(folder / HEADER_FILE)
            locate = in_folder(folder, content)
        elif folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
            raise ProfileError(f"profile: there is no folder {str(source)!r}; on the Hub it would be organisation/name")
        else:
            path, locate = download(str(source), revision=revision, token=token, cache_dir=cache_dir)
            content = read_header(path)
        return cls(
            header=content.header,
            uses=content.uses,
            held_out=content.held_out,
            moments=MomentFiles(content, locate),
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        storage: str | Encoding = DEFAULT_STORAGE,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload safety profile",
        create_pr: bool = False,
    ) -> str:
        """Upload the profile to the Hub, in one commit; `SafetyProfile.load(repo_id)` opens it.

        The safety data that was held out goes along, tokenised: make the repository private if the data is.
        In a run of several processes all of them call this, and the main one uploads.

        Args:
            repo_id: `organisation/name`, or a name of your own; made if it does not exist. A profile that is there is
                replaced.
            storage: How moments are stored, as in `save`.
            base_model: Name of the base model on the Hub, for the card; the one that the profile names if None.
            private: Whether a new repository is private; None for the organisation's default.
            token: Access token; None for the one that was stored by logging in.
            revision: Branch to commit to, made if it does not exist; None for the default one.
            commit_message: Message of the commit.
            create_pr: Whether to open a pull request instead of committing.

        Returns:
            Address of the commit.

        Raises:
            ConfigurationError: There is no such storage.
            ProfileError: The Hub refuses or cannot be reached.
            RankError: Another process failed.
        """
        encoding = encoding_of(storage)
        ranks, address = self._ranks(), ""
        with tempfile.TemporaryDirectory(prefix="safedelta-") as parent:
            folder = Path(parent) / "profile"
            self.save(folder, encoding)
            with ranks.together():
                if ranks.is_main:
                    base_model = base_model or self.header.name
                    write_card(folder, self.header, storage=str(encoding), name=repo_id, base_model=base_model)
                    address = upload(
                        folder,
                        repo_id,
                        revision=revision,
                        token=token,
                        private=private,
                        message=commit_message,
                        create_pr=create_pr,
                    )
        return ranks.broadcast(address, owner=0)


def opened_profile(owner: str, profile: object, setting: str = "profile") -> SafetyProfile:
    """The profile that an argument names.

    Args:
        owner: What has the argument, for errors.
        profile: A profile, the folder of one, or its repository on the Hub.
        setting: Name of the argument.

    Returns:
        The profile.

    Raises:
        ConfigurationError: It is none of these.
    """
    kinds = (SafetyProfile, str, Path)
    require_kind(owner, setting, profile, kinds, "a SafetyProfile, its folder, or its repository on the Hub")
    return SafetyProfile.load(profile) if isinstance(profile, str | Path) else cast(SafetyProfile, profile)


def with_ordinary(profile: SafetyProfile, ordinary: SafetyProfile, weight: float) -> SafetyProfile:
    """A profile that protects ordinary behaviour together with the refusals: its Hessians are `H + weight * R`.

    Where the moments are in the memory of several processes, all of them call this.

    Args:
        profile: Profile on the safety data.
        ordinary: Profile of the same base on ordinary data.
        weight: `rho`, weight of the ordinary data's Hessians, positive.

    Returns:
        A profile whose moments are summed when they are read.

    Raises:
        ConfigurationError: The weight is not positive.
        ProfileError: The profiles are of different base models, or the first protects ordinary data already.
    """
    require_number("with_ordinary", "weight", weight, "positive and finite", lambda value: 0 < value < math.inf)
    if dict(profile.header.base) != dict(ordinary.header.base):
        raise ProfileError(
            f"with_ordinary: the ordinary data's profile was made of {ordinary.header.model}, which is another base "
            f"than that of the safety profile ({profile.header.model}), or the same in another precision; collect it "
            "again"
        )
    if profile.header.retention is not None:
        raise ProfileError(
            "with_ordinary: the safety profile protects ordinary data already; start from one that does not"
        )
    seen = ordinary.header
    retention = Retention(data=seen.data, sequences=seen.sequences, tokens=seen.tokens, weight=weight)
    return replace(
        profile, header=replace(profile.header, retention=retention), moments=_summed(profile, ordinary, weight)
    )


def _summed(profile: SafetyProfile, ordinary: SafetyProfile, weight: float) -> Moments:
    pairs = ((use.moment, ordinary.key_of(use)) for use in profile.uses)
    twins = {key: twin for key, twin in pairs if twin is not None}
    own, other, add = profile.moments, ordinary.moments, partial(_protecting, weight)
    sharded = next((moments for moments in (own, other) if isinstance(moments, ShardedMoments)), None)
    if sharded is None:
        return SummedMoments(own, other, twins, add)
    # Where every rank can read the safety data's moments, it sums up those of which it has the other half.
    owners = {key: _first(own.owner(key), other.owner(twins[key]) if key in twins else None, 0) for key in own}
    if isinstance(other, ShardedMoments):
        brought = ((key, other.brought(twin, owners[key])) for key, twin in twins.items())
        other = Moments({key: moment for key, moment in brought if moment is not None})
        twins = dict(zip(other, other, strict=True))
    shapes = {key: own.shape(key) for key in own}
    return ShardedMoments(shapes, owners, SummedMoments(own, other, twins, add), sharded.ranks)


def _first(*found: int | None) -> int:
    return next(rank for rank in found if rank is not None)


def _protecting(weight: float, safety: InputMoment | None, kept: InputMoment | None) -> InputMoment:
    assert safety is not None, "what the safety data never reached is not adjusted"
    if kept is None:
        return safety  # ordinary data never reaches what reads it
    # In units of the safety data's number of sequences, since `H = (2/N) total`.
    share = weight * safety.sequences / kept.sequences
    return replace(safety, total=total_of([safety.total, kept.total.to(safety.total.device) * share]))
