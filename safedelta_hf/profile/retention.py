"""Behaviour to protect beside the refusals: moments of ordinary data, added to those of the safety data."""

from dataclasses import replace
from functools import partial

from safedelta_hf.core.moment import InputMoment
from safedelta_hf.errors import ConfigurationError, ProfileError
from safedelta_hf.profile.moments import Moments, ShardedMoments, SummedMoments
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
    return replace(safety, total=safety.total + share * kept.total.to(safety.total.device))
