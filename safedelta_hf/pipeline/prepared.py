"""What the rule makes of the moments that one parameter needs, kept while another needs them too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.errors import ProfileError
from safedelta_hf.records import Use
from safedelta_hf.rules.rule import LayerMoments, Rule, State

Key = tuple[str, str | None]
"""Of the safety moment and of the task moment."""


class PreparedMoments:
    """Moments of a profile and the states that a rule prepared from them, for one parameter at a time.

    Parameters that read the same moment stand together in a plan, so each moment is read and factored once.

    Args:
        profile: Where the moments are read.
        rule: What prepares them.
        task: Profile of the same base on the task data, where the rule needs one.
        memory: Bytes of moments to hold for later passes over the same parameters, beside those in use.

    Raises:
        ProfileError: The rule needs the task's moments and there are none, or they are those of another base.
    """

    def __init__(self, profile: SafetyProfile, rule: Rule, task: SafetyProfile | None = None, memory: int = 0) -> None:
        self._memory = memory
        self._profile = profile
        self._rule = rule
        self._task = _checked(task, profile, rule) if rule.needs_task else None
        self._held: dict[Key, LayerMoments] = {}
        self._states: dict[Key, State] = {}

    def hold(self, uses: Sequence[Use], device: torch.device) -> None:
        """Hold what these uses of a parameter need, and of the rest what the memory allows.

        Args:
            uses: How the parameter is used.
            device: Where its delta is.
        """
        needed = {self._key(use) for use in uses}
        for key, moments in list(self._held.items()):
            is_spare = key not in needed and self._held_bytes() > self._memory
            if is_spare or moments.safety.device != device:
                del self._held[key]
                self._states.pop(key, None)
        for key in needed - set(self._held):
            self._held[key] = self._read(key, device)

    def hessian(self, use: Use) -> Tensor:
        """The Hessian of a use that is held.

        Args:
            use: The use.

        Returns:
            `H` [in, in], or its diagonal [in], float32.
        """
        return self._held[self._key(use)].safety

    def state(self, use: Use) -> State:
        """What the rule prepares for a use that is held, once: a Hessian may be asked for where no state is.

        Args:
            use: The use.

        Returns:
            The rule's own state.
        """
        key = self._key(use)
        if key not in self._states:
            self._states[key] = self._rule.prepare(self._held[key])
        return self._states[key]

    def _held_bytes(self) -> int:
        return sum(moments.safety.nbytes for moments in self._held.values())

    def _key(self, use: Use) -> Key:
        return use.moment, None if self._task is None else self._task.key_of(use)

    def _read(self, key: Key, device: torch.device) -> LayerMoments:
        safety = self._profile.moments[key[0]].hessian(device)
        if self._task is None:
            return LayerMoments(safety=safety)
        if key[1] is None:
            return LayerMoments(safety=safety, task=torch.zeros_like(safety))  # never reached by the task data
        return LayerMoments(safety=safety, task=self._task.moments[key[1]].hessian(device))


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
