"""Behaviour to protect beside the refusals: moments of ordinary data, added to those of the safety data."""

from dataclasses import replace

from safedelta_hf.capture.moments import MomentsByKey
from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.records import Retention


def with_retention(profile: SafetyProfile, ordinary: SafetyProfile, weight: float) -> SafetyProfile:
    """A profile that protects ordinary behaviour together with the refusals: its Hessians are `H + weight * R`.

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
        profile,
        header=replace(profile.header, retention=retention),
        moments=_Summed(profile, ordinary, weight),
    )


class _Summed(MomentsByKey):
    def __init__(self, profile: SafetyProfile, ordinary: SafetyProfile, weight: float) -> None:
        super().__init__(profile.moments)
        self._moments = profile.moments
        self._ordinary = ordinary
        self._weight = weight
        twins = ((use.moment, ordinary.key_of(use)) for use in profile.uses)
        self._twins = {key: twin for key, twin in twins if twin is not None}

    def __getitem__(self, key: str) -> InputMoment:
        moment = self._moments[key]
        if key not in self._twins:
            return moment  # ordinary data never reaches what reads it
        other = self._ordinary.moments[self._twins[key]]
        # In units of the safety data's number of sequences, since `H = (2/N) total`.
        share = self._weight * moment.sequences / other.sequences
        total = moment.total + share * other.total.to(moment.total.device)
        return replace(moment, total=total)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._moments.shape(key)
