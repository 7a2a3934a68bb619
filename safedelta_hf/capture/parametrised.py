"""Weights that are computed from parameters: which can be adjusted as one, and how they are watched."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import nn

from safedelta_hf.capture.observer import Observer
from safedelta_hf.parametrised import ParametrisedWeight, parametrised_weights


@dataclass(frozen=True, kw_only=True)
class ParametrisedWeights:
    """The weights of a model that are computed from parameters.

    Attributes:
        followed: Those that are watched and adjusted as one, by canonical name.
        reasons: Why others are not, by the name of each parameter that they are computed from.
    """

    followed: Mapping[str, ParametrisedWeight]
    reasons: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> "ParametrisedWeights":
        """Try which weights can be set.

        Args:
            model: The base model, undisturbed.

        Returns:
            Its weights.
        """
        followed: dict[str, ParametrisedWeight] = {}
        reasons: dict[str, str] = {}
        for name, weight in parametrised_weights(model).items():
            obstacle = weight.obstacle()
            if obstacle:
                reasons |= dict.fromkeys(weight.originals, f"{name} is computed from it, and {obstacle}")
            else:
                followed[name] = weight
        return cls(followed=followed, reasons=reasons)

    @property
    def originals(self) -> dict[str, str]:
        """The weight that is followed, by the name of each parameter that it is computed from."""
        return {original: name for name, weight in self.followed.items() for original in weight.originals}


@contextmanager
def computed_weights(weights: Iterable[ParametrisedWeight], observer: Observer) -> Iterator[None]:
    """Tell an observer of weights as they are computed; how they are computed is not looked at.

    Args:
        weights: Weights of the model that runs.
        observer: Who is told.

    Yields:
        Nothing.
    """
    with ExitStack() as hooks:
        for weight in weights:
            for handle in weight.watch(observer.look_away, partial(observer.computed_weight, weight.name)):
                hooks.callback(handle.remove)
        yield
