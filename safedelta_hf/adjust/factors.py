"""What the rule makes of the moments that one parameter needs, kept while another needs them too."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from safedelta_hf.core.curvature import factorise
from safedelta_hf.core.low_rank import Matrix, dense
from safedelta_hf.core.transform import DeltaMatrix, Transform
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import FactorisationError
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records.uses import Use
from safedelta_hf.rules.rule import Factors, LayerMoments, TransformRule

Key = tuple[str, str | None]
"""Of the safety moment and of the task moment."""

ROUNDING_DAMPING = 0.1
"""Share of the mean diagonal that is added to a Hessian before errors of rounding are fed on with it. Smaller shares
move the weights further from what was wanted (at .01 twice as far, at .0001 ten times) for the same safety loss."""

AHEAD = 4
"""Moments that are looked at for each other rank, to find one that it can factor meanwhile."""


class FactorCache:
    """Moments of a profile and the factors that a rule made of them, for one parameter at a time.

    Parameters that read the same moment stand together in a plan, so each moment is read and factored once. Where there
    are ranks, each factors the moments that it owns, as many of them at a time as there are ranks; the others are given
    the Hessian and the factors, and every rank runs the rule.

    Args:
        profile: Where the moments are read.
        task: Profile of the same base on the task data, where the rule weighs it.
        uses: All that will be asked for, in order.
        ranks: The processes of the run; all of them ask for the same, in the same order.
        memory: Bytes of moments to hold for later passes over the same parameters, beside those in use.
    """

    def __init__(
        self,
        profile: SafetyProfile,
        task: SafetyProfile | None = None,
        *,
        uses: Iterable[Use] = (),
        ranks: Ranks | None = None,
        memory: int = 0,
    ) -> None:
        self._memory = memory
        self._profile = profile
        self._task = task
        self._ranks = ranks or Ranks()
        self._order = list(dict.fromkeys(map(self._key, uses)))
        self._positions = {key: number for number, key in enumerate(self._order)}
        self._hessians: dict[Key, Matrix] = {}
        self._ahead: list[Key] = []
        self._bytes = 0
        self._factors: dict[Key, Factors] = {}
        self._rounding: dict[Key, Tensor] = {}
        self._everywhere: set[Key] = set()

    @property
    def is_empty(self) -> bool:
        """Whether no data was read, so that there are no moments."""
        return not self._profile.is_read

    def hold(self, uses: Sequence[Use], device: torch.device) -> None:
        """Hold what these uses of a parameter need, and of the rest what the memory allows.

        Args:
            uses: How the parameter is used.
            device: Where its delta is.
        """
        needed = dict.fromkeys(map(self._key, uses))  # in order, which is the same on all ranks
        for key in self._spare(needed, device):
            self._bytes -= self._hessians.pop(key).nbytes
            self._rounding.pop(key, None)
            if key not in self._ahead:
                self._forget(key)
        for key in needed:
            if key not in self._hessians:
                owner = self._owner(key)
                own = self._profile.moments[key[0]].hessian(device) if self._ranks.rank == owner else None
                hessian = self._ranks.broadcast(own, owner, device)
                assert hessian is not None, "the owner has it"
                self._hessians[key] = hessian
                self._bytes += hessian.nbytes

    def _spare(self, needed: Collection[Key], device: torch.device) -> list[Key]:
        spare = [key for key in needed if key in self._hessians and self._hessians[key].device != device]
        excess = self._bytes - self._memory
        for key in reversed(self._hessians):  # passes go from the first to the last
            if excess <= 0:
                break
            if key not in needed:
                spare.append(key)
                excess -= self._hessians[key].nbytes
        return spare

    def hessian(self, use: Use) -> Matrix:
        """The Hessian of a use that is held.

        Args:
            use: The use.

        Returns:
            `H` [in, in], be it of low rank, or its diagonal [in], float32.
        """
        return self._hessians[self._key(use)]

    def rounding(self, use: Use) -> Tensor:
        """What the errors of rounding are fed on with, for a use that is held.

        Args:
            use: The use, of a role whose inputs mix.

        Returns:
            `R` [in, in], upper triangular, of the damped Hessian `R R^T`.
        """
        key = self._key(use)
        hessian = self._hessians[key]
        if key not in self._rounding:
            owner = self._owner(key)
            own = factorise(dense(hessian), ROUNDING_DAMPING).factor if self._ranks.rank == owner else None
            factor = self._ranks.broadcast(own, owner, hessian.device)
            assert factor is not None, "the owner has it"
            self._rounding[key] = factor
        return self._rounding[key]

    def transform(self, rule: TransformRule, use: Use, matrix: DeltaMatrix) -> Transform:
        """What a rule makes of a delta, for a use that is held.

        Args:
            rule: The rule, at whatever strength.
            use: The use.
            matrix: The delta as this use sees it.

        Returns:
            The transform.

        Raises:
            FactorisationError: The rule cannot factor the moments at its strength; on all ranks.
        """
        key = self._key(use)
        owner, device = self._owner(key), self._hessians[key].device
        if key not in self._factors:  # not before: a Hessian may be asked for where no factors are
            self._factorise_from(key, rule, device)
        if key not in self._everywhere:
            self._everywhere.add(key)
            self._factors[key] = self._ranks.broadcast(self._factors[key], owner, device)
        factors = self._factors[key]
        if isinstance(factors, FactorisationError):
            raise factors
        return rule.transform(factors, matrix)

    def _factorise_from(self, key: Key, rule: TransformRule, device: torch.device) -> None:
        """Let each rank factor its own of the next moments.

        Args:
            key: The first of them.
            rule: What factorises them.
            device: Where its delta is.
        """
        first, before = self._positions.get(key), self._ahead
        self._ahead = [] if first is None else self._next_of_others(first)
        for old in before:
            if old not in self._ahead and old not in self._hessians:
                self._forget(old)
        for each in (key, *self._ahead):
            if each in self._factors:
                continue
            owner = self._owner(each)
            task, made = self._task_hessian(each, owner, device), None
            if self._ranks.rank == owner:
                safety = self._hessians.get(each)
                safety = self._profile.moments[each[0]].hessian(device) if safety is None else safety
                try:
                    made = rule.factorise(LayerMoments(safety=safety, task=task))
                except FactorisationError as error:
                    made = error  # for all ranks alike, so that they can go on with another strength
            self._factors[each] = made  # None where it is another rank's

    def _forget(self, key: Key) -> None:
        self._factors.pop(key, None)
        self._everywhere.discard(key)

    def _next_of_others(self, first: int) -> list[Key]:
        # The next large moment of each other rank, if it comes soon.
        busy, found = {self._owner(self._order[first])}, []
        for key in self._order[first + 1 : first + 1 + AHEAD * (self._ranks.size - 1)]:
            if self._owner(key) not in busy and len(self._profile.moments.shape(key[0])) > 1:
                busy.add(self._owner(key))
                found.append(key)
        return found

    def _task_hessian(self, key: Key, owner: int, device: torch.device) -> Matrix | None:
        if self._task is None:
            return None
        if key[1] is None:
            return torch.zeros(self._profile.moments.shape(key[0]), device=device)  # never reached by the task data
        has_it = self._task.moments.owner(key[1])
        has_it = owner if has_it is None else has_it
        found = self._task.moments[key[1]].hessian(device) if self._ranks.rank == has_it else None
        return found if has_it == owner else self._ranks.broadcast(found, has_it, device)

    def _key(self, use: Use) -> Key:
        return use.moment, None if self._task is None else self._task.key_of(use)

    def _owner(self, key: Key) -> int:
        owner = self._profile.moments.owner(key[0])
        # Where each rank can read all of them, they take turns.
        return self._positions.get(key, 0) % self._ranks.size if owner is None else owner
