"""Task ridge: keep of each direction of input space what the task uses more than the safety data does."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from safedelta_hf.core.ridge import shrinkage, utility_of
from safedelta_hf.core.transform import Dense, Transform
from safedelta_hf.errors import ProfileError
from safedelta_hf.rules.ridge import Ridge
from safedelta_hf.rules.rule import LayerMoments, Shrinking, number


@dataclass(frozen=True, kw_only=True)
class TaskRidge(Shrinking):
    """Ridge that measures utility where the task lives: `D* = D N (N + lam H)^-1`.

    With `G` the second moment of the layer's inputs on the fine-tuning data and
    `N = G + blend * mean(diag G) * I`, it minimises `tr((D* - D) N (D* - D)^T) + lam tr(D* H D*^T)`: the layer's
    outputs on the task are held near the fine-tuned model's, those on the safety data near the base model's.

    Args:
        strength: `lam`; 0 returns the fine-tuned weights, larger values keep less. "auto" measures.
        blend: Share of the plain norm in the utility, positive; large values approach `Ridge`.

    Raises:
        ConfigurationError: A value is outside its range or not a number.
    """

    blend: float = 0.1

    name: ClassVar[str] = "task_ridge"
    search_range: ClassVar[tuple[float, float]] = (1e-3, 1e4)
    needs_task: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("blend", "positive and finite", lambda value: 0 < value < math.inf)

    @override
    def without_task(self) -> Ridge:
        # The same objective with the plain norm as utility, to which it comes near where the blend is large.
        return Ridge(strength=self.strength)

    @override
    def factorise(self, moments: LayerMoments) -> Transform:
        if moments.task is None:
            raise ProfileError(
                "TaskRidge needs the moments of the task data; pass task_profile=<a profile of the task data>"
            )
        if not moments.task.any() and number(self.strength) > 0:
            # The task does not depend on this layer, so any price is too high; what safety never uses is free.
            safety = moments.safety
            unused = (safety if isinstance(safety, Tensor) and safety.ndim == 1 else safety.diagonal()) == 0
            return Dense(matrix=unused.to(torch.float32), notes=("the task data never reached it",))
        utility = utility_of(moments.task, self.blend)
        return shrinkage(moments.safety, utility, number(self.strength))
