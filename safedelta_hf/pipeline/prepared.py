"""What the rule makes of the moments that one parameter needs, kept while the next parameter needs them too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safedelta_hf.capture.profile import SafetyProfile
from safedelta_hf.records import Use
from safedelta_hf.rules import Rule
from safedelta_hf.rules.rule import State


class PreparedMoments:
    """Hessians of a profile and the states that a rule prepared from them, for one parameter at a time.

    Parameters that read the same moment stand together in a plan, so each moment is read and factored once.

    Args:
        profile: Where the moments are read.
        rule: What prepares them.
    """

    def __init__(self, profile: SafetyProfile, rule: Rule) -> None:
        self._profile = profile
        self._rule = rule
        self._held: dict[str, tuple[Tensor, State]] = {}

    def hold(self, uses: Sequence[Use], device: torch.device) -> None:
        """Hold what these uses of a parameter need, and nothing else.

        Args:
            uses: How the parameter is used.
            device: Where its delta is.
        """
        needed = {use.moment for use in uses}
        self._held = {key: pair for key, pair in self._held.items() if key in needed and pair[0].device == device}
        for key in needed - set(self._held):
            hessian = self._profile.moments[key].hessian(device)
            self._held[key] = (hessian, self._rule.prepare(hessian))

    def hessian(self, use: Use) -> Tensor:
        """The Hessian of a use that is held.

        Args:
            use: The use.

        Returns:
            `H` [in, in], or its diagonal [in], float32.
        """
        return self._held[use.moment][0]

    def state(self, use: Use) -> State:
        """What the rule prepared for a use that is held.

        Args:
            use: The use.

        Returns:
            The rule's own state.
        """
        return self._held[use.moment][1]
