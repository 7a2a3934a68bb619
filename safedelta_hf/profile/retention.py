"""Behaviour to protect beside the refusals: moments of ordinary data, added to those of the safety data."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.profile.moments import Moments, MomentsByKey, OwnedMoment, OwnedMoments, moved
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records import Retention


def with_retention(profile: SafetyProfile, ordinary: SafetyProfile, weight: float) -> SafetyProfile:
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
        ProfileError: The profiles are of different base models, or the first has a retention already.
    """
    if not weight > 0:
        raise ConfigurationError(f"retention: weight={weight!r} must be positive")
    if dict(profile.header.base) != dict(ordinary.header.base):
        raise ProfileError("retention: the profile of the ordinary data was made of another base model")
    if profile.header.retention is not None:
        raise ProfileError("retention: the safety profile protects ordinary data already; start from one that does not")
    seen = ordinary.header
    retention = Retention(data=seen.data, sequences=seen.sequences, tokens=seen.tokens, weight=weight)
    return replace(
        profile, header=replace(profile.header, retention=retention), moments=_summed(profile, ordinary, weight)
    )


def _summed(profile: SafetyProfile, ordinary: SafetyProfile, weight: float) -> Moments:
    pairs = ((use.moment, ordinary.key_of(use)) for use in profile.uses)
    twins = {key: twin for key, twin in pairs if twin is not None}
    own, other = profile.moments, ordinary.moments
    if not isinstance(other, OwnedMoments):
        added: Mapping[str, InputMoment] = _Renamed(other, twins)
        if not isinstance(own, OwnedMoments):
            return _Summed(own, added, weight)
        return OwnedMoments(own.entries, _Summed(own, added, weight), own.ranks)
    if isinstance(own, OwnedMoments):
        entries = own.entries
    else:  # every rank can read these, and sums up those of which it has the other half
        owners = {key: other.owner(twin) for key, twin in twins.items()}
        entries = {key: OwnedMoment(shape=own.shape(key), owner=owners.get(key, 0)) for key in own}
    added = moved(other, {key: (twin, entries[key].owner) for key, twin in twins.items()})
    return OwnedMoments(entries, _Summed(own, added, weight), other.ranks)


class _Renamed(Mapping[str, InputMoment]):
    """Moments under the keys of another profile."""

    def __init__(self, moments: Moments, keys: Mapping[str, str]) -> None:
        self._moments, self._keys = moments, keys

    def __getitem__(self, key: str) -> InputMoment:
        return self._moments[self._keys[key]]

    def __contains__(self, key: object) -> bool:
        return key in self._keys  # the inherited way would read the moment

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Summed(MomentsByKey):
    """Sums of moments, and of others of the same keys where there are any."""

    def __init__(self, moments: Moments, added: Mapping[str, InputMoment], weight: float) -> None:
        super().__init__(moments)
        self._moments, self._added, self._weight = moments, added, weight

    def __getitem__(self, key: str) -> InputMoment:
        moment = self._moments[key]
        if key not in self._added:
            return moment  # ordinary data never reaches what reads it
        other = self._added[key]
        # In units of the safety data's number of sequences, since `H = (2/N) total`.
        share = self._weight * moment.sequences / other.sequences
        total = moment.total + share * other.total.to(moment.total.device)
        return replace(moment, total=total)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._moments.shape(key)
