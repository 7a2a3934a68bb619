"""What will be done with each parameter, and what the user wants done with those that no rule covers."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.records.uses import Role, Use


class Action(StrEnum):
    """What happens to a parameter."""

    ADJUST = "adjust"
    KEEP = "keep"
    RESET = "reset"


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What happens to the parameters that are not the weights of linear layers.

    Each is "adjust" (the rule with a diagonal curvature), "keep" (as tuned) or "reset" (to the base).

    Attributes:
        embeddings: Token and position embeddings.
        norms: Scales of norm layers.
        biases: Biases of linear and norm layers.
        head: The output projection. A tied head is one parameter with the embedding: the stronger of both settings
            counts, in the order reset, adjust, keep.
        uncovered: Parameters that the fine-tuning changed and the method cannot cover; "error" stops before
            anything is changed and names them.

    Raises:
        ConfigurationError: A value is not one of those named.
    """

    embeddings: Literal["adjust", "keep", "reset"] = "adjust"
    norms: Literal["adjust", "keep", "reset"] = "adjust"
    biases: Literal["adjust", "keep", "reset"] = "adjust"
    head: Literal["adjust", "keep", "reset"] = "adjust"
    uncovered: Literal["error", "keep", "reset"] = "error"

    def __post_init__(self) -> None:
        for setting in fields(self):
            allowed = ["error" if setting.name == "uncovered" else "adjust", "keep", "reset"]
            value = getattr(self, setting.name)
            if value not in allowed:
                raise ConfigurationError(f"Treatment: {setting.name}={value!r} is not one of {allowed}")

    def of(self, role: "Role") -> "Action":
        """What happens to a parameter in one of its roles.

        Args:
            role: The role.

        Returns:
            The action; linear layers are always adjusted.
        """
        settings = {
            Role.EMBEDDING: self.embeddings,
            Role.SCALE: self.norms,
            Role.BIAS: self.biases,
            Role.OFFSET: self.biases,
            Role.HEAD: self.head,
        }
        return Action(settings.get(role, "adjust"))


@dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """What will be done with one parameter, known before any weight is touched.

    Attributes:
        parameter: Canonical name.
        shape: Shape of the parameter.
        action: What will be done if the fine-tuning changed it; None where that has to be decided by the user first.
        reason: Why, if it is not adjusted.
        uses: How the forward pass uses it; empty if unknown.
        aliases: Other names of the same (tied) parameter.
        originals: Parameters that it is computed from, if it is no parameter itself.
    """

    parameter: str
    shape: tuple[int, ...]
    action: Action | None
    reason: str = ""
    uses: tuple[Use, ...] = ()
    aliases: tuple[str, ...] = ()
    originals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One entry for every parameter, or weight computed from some, of the model, in the order of their handling."""

    entries: tuple[PlanEntry, ...]
