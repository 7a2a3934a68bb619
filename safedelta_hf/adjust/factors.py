"""What the rule makes of the moments that one parameter needs, kept while another needs them too."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.transform import DeltaMatrix, Transform
from safedelta_hf.deltas.sharded import ShardedMatrix
from safedelta_hf.distributed.ranks import Ranks
from safedelta_hf.errors import ProfileError
from safedelta_hf.profile.profile import SafetyProfile
from safedelta_hf.records import Use
from safedelta_hf.rules.rule import Factors, LayerMoments, Rule, TransformRule

Key = tuple[str, str | None]
"""Of the safety moment and of the task moment."""

AHEAD = 4
"""Moments that are looked at for each other rank, to find one that it can factor meanwhile."""


class FactorCache:
    """Moments of a profile and the factors that a rule made of them, for one parameter at a time.

    Parameters that read the same moment stand together in a plan, so each moment is read and factored once. Where there
    are ranks, each factors the moments that it owns, as many of them at a time as there are ranks; the others are given
    the Hessian and the transform.

    Args:
        profile: Where the moments are read.
        rule: What factorises them, at whatever strength.
        task: Profile of the same base on the task data, where the rule needs one.
        uses: All that will be asked for, in order.
        ranks: The processes of the run; all of them ask for the same, in the same order.
        memory: Bytes of moments to hold for later passes over the same parameters, beside those in use.

    Raises:
        ProfileError: The rule needs the task's moments and there are none, or they are those of another base.
    """

    def __init__(
        self,
        profile: SafetyProfile,
        rule: Rule,
        task: SafetyProfile | None = None,
        *,
        uses: Iterable[Use] = (),
        ranks: Ranks | None = None,
        memory: int = 0,
    ) -> None:
        self._memory = memory
        self._profile = profile
        self._task = _checked(task, profile, rule) if rule.needs_task else None
        self._ranks = ranks or Ranks()
        self._order = list(dict.fromkeys(map(self._key, uses)))
        self._positions = {key: number for number, key in enumerate(self._order)}
        self._hessians: dict[Key, Tensor] = {}
        self._ahead: list[Key] = []
        self._factorised: set[Key] = set()
        self._factors: dict[Key, Factors] = {}

    def hold(self, uses: Sequence[Use], device: torch.device) -> None:
        """Hold what these uses of a parameter need, and of the rest what the memory allows.

        Args:
            uses: How the parameter is used.
            device: Where its delta is.
        """
        needed = dict.fromkeys(map(self._key, uses))  # in order, which is the same on all ranks
        for key, hessian in reversed(list(self._hessians.items())):  # passes go from the first to the last
            is_spare = key not in needed and self._held_bytes() > self._memory
            if is_spare or hessian.device != device:
                del self._hessians[key]
        for key in self._factorised - set(self._hessians) - set(self._ahead):
            self._factors.pop(key, None)
            self._factorised.discard(key)
        for key in needed:
            if key not in self._hessians:
                owner = self._owner(key)
                own = self._profile.moments[key[0]].hessian(device) if self._ranks.rank == owner else None
                told = self._ranks.broadcast(own, owner, device)
                assert told is not None, "the owner has it"
                self._hessians[key] = told

    def hessian(self, use: Use) -> Tensor:
        """The Hessian of a use that is held.

        Args:
            use: The use.

        Returns:
            `H` [in, in], or its diagonal [in], float32.
        """
        return self._hessians[self._key(use)]

    def transform(self, rule: TransformRule, use: Use, matrix: DeltaMatrix) -> Transform:
        """What a rule makes of a delta, for a use that is held.

        Args:
            rule: The rule, at whatever strength.
            use: The use.
            matrix: The delta as this use sees it.

        Returns:
            The transform.
        """
        key = self._key(use)
        owner, device = self._owner(key), self._hessians[key].device
        if key not in self._factorised:  # not before: a Hessian may be asked for where no factors are
            self._factorise_from(key, rule, device)
        if self._ranks.rank == owner:
            factors = self._factors[key]
            # Of a delta that its owner has whole, there is nothing to ask the others.
            known: list[Tensor] = []
            asked = _AskedStatistics(matrix, self._ranks, known) if isinstance(matrix, ShardedMatrix) else matrix
            made = rule.transform(factors, asked)
            return self._ranks.broadcast(made, owner, known=known)
        known = []
        while isinstance(told := self._ranks.broadcast(None, owner, device, known), _Question):
            told.of(matrix)
        assert told is not None, "the owner has made it"
        return told

    def _factorise_from(self, key: Key, rule: TransformRule, device: torch.device) -> None:
        """Let each rank factor its own of the next moments.

        Args:
            key: The first of them.
            rule: What factorises them.
            device: Where its delta is.
        """
        first = self._positions.get(key)
        self._ahead = [] if first is None else self._next_of_others(first)
        for each in (key, *self._ahead):
            if each in self._factorised:
                continue
            self._factorised.add(each)
            owner = self._owner(each)
            task = self._task_hessian(each, owner, device)
            if self._ranks.rank == owner:
                safety = self._hessians.get(each)
                safety = self._profile.moments[each[0]].hessian(device) if safety is None else safety
                self._factors[each] = rule.factorise(LayerMoments(safety=safety, task=task))

    def _next_of_others(self, first: int) -> list[Key]:
        # The next large moment of each other rank, if it comes soon.
        busy, found = {self._owner(self._order[first])}, []
        for key in self._order[first + 1 : first + 1 + AHEAD * (self._ranks.size - 1)]:
            if self._owner(key) not in busy and len(self._profile.moments.shape(key[0])) > 1:
                busy.add(self._owner(key))
                found.append(key)
        return found

    def _task_hessian(self, key: Key, owner: int, device: torch.device) -> Tensor | None:
        if self._task is None:
            return None
        if key[1] is None:
            shape = self._profile.moments[key[0]].total.shape if self._ranks.rank == owner else ()
            return torch.zeros(shape, device=device)  # never reached by the task data
        has_it = self._task.moments.owner(key[1])
        has_it = owner if has_it is None else has_it
        found = self._task.moments[key[1]].hessian(device) if self._ranks.rank == has_it else None
        return found if has_it == owner else self._ranks.broadcast(found, has_it, device)

    def _held_bytes(self) -> int:
        return sum(hessian.nbytes for hessian in self._hessians.values())

    def _key(self, use: Use) -> Key:
        return use.moment, None if self._task is None else self._task.key_of(use)

    def _owner(self, key: Key) -> int:
        owner = self._profile.moments.owner(key[0])
        # Where each rank can read all of them, they take turns.
        return self._positions.get(key, 0) % self._ranks.size if owner is None else owner


@dataclass(frozen=True)
class _Question:
    """What the owner of a moment asks of the ranks that hold a delta.

    Attributes:
        statistic: Name of a method of `DeltaMatrix`.
        transform: Its argument.
    """

    statistic: str
    transform: Transform | None

    def of(self, matrix: DeltaMatrix) -> Any:  # noqa: ANN401 - whatever the method returns
        """Answer it; all ranks that hold the delta do.

        Args:
            matrix: The delta.

        Returns:
            The statistic, over all ranks.
        """
        return getattr(matrix, self.statistic)(self.transform)


class _AskedStatistics(DeltaMatrix):
    """Statistics of a delta, which all ranks that hold it are asked for.

    Args:
        matrix: The delta; every rank has it, or some of it.
        ranks: The ranks, of which the others answer questions.
        known: Tensors that the others were told of already; grows.
    """

    def __init__(self, matrix: DeltaMatrix, ranks: Ranks, known: list[Tensor]) -> None:
        self._matrix, self._ranks, self._known = matrix, ranks, known

    @property
    @override
    def rows(self) -> int:
        return self._matrix.rows

    @override
    def column_energy(self, transform: Transform | None = None) -> Tensor:
        energy: Tensor = self._asked("column_energy", transform)
        return energy

    @override
    def inner(self, transform: Transform) -> float:
        product: float = self._asked("inner", transform)
        return product

    def _asked(self, statistic: str, transform: Transform | None) -> Any:  # noqa: ANN401
        question = _Question(statistic, transform)
        self._ranks.broadcast(question, self._ranks.rank, known=self._known)
        return question.of(self._matrix)


def _checked(task: SafetyProfile | None, profile: SafetyProfile, rule: Rule) -> SafetyProfile:
    if task is None:
        raise ProfileError(
            f"{rule.name}: this rule weighs what the fine-tuning data uses; pass task=collect_profile(base, task_data, "
            "...), a profile of the same base on examples of that data"
        )
    if dict(task.header.base) != dict(profile.header.base):
        raise ProfileError(
            "task: this profile was made of another base model than the safety profile; collect it again"
        )
    return task
