"""What one pass over data found about the uses of weights, but for the sums: plain data, which ranks exchange."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from safedelta_hf.records import Role, Use


@dataclass(frozen=True, kw_only=True)
class ObservedUses:
    """What was observed to happen to the weights of a model.

    Attributes:
        uses: Each use under the key of a moment of its own, in the order in which they were first met.
        leaders: Whose moment serves a product, by key of those that follow another.
        read: Inputs that each product read, of those that may share a moment, by key.
        tokens: Inputs of each use, by key.
        shapes: Shape of each moment that there is, by key.
        all_zero: Keys of the uses of parts that read nothing but zeros, as an expert does that no token was routed to.
        not_targeted: Names of what was multiplied as a matrix and not chosen.
        unsupported: Why parameters that were used were not read, by name.
        unshared: Why products cannot share moments as they did; None if they can.
    """

    uses: Mapping[str, Use]
    leaders: Mapping[str, str] = field(default_factory=dict)
    read: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    all_zero: frozenset[str] = frozenset()
    not_targeted: frozenset[str] = frozenset()
    unsupported: Mapping[str, str] = field(default_factory=dict)
    unshared: str | None = None

    def covered(self, order: Sequence[str], chosen: frozenset[str]) -> list[Use]:
        """How each parameter is used that a moment covers.

        Args:
            order: Names of all parameters.
            chosen: Names of those whose products are read.

        Returns:
            The uses with the keys of the moments that serve them, in the order of the parameters.
        """
        untargeted = self.untargeted(chosen)
        found = [
            replace(use, moment=self.leaders.get(key, key))
            for key, use in self.uses.items()
            if key not in self.all_zero and not (use.role is Role.BIAS and use.parameter in untargeted)
        ]
        return in_order(found, order)

    def untargeted(self, chosen: frozenset[str]) -> set[str]:
        """Names of what is multiplied as a matrix but was not chosen, and of the biases that go with it.

        Args:
            chosen: Names of the parameters whose products are read.

        Returns:
            The names.
        """
        modules = {name.rpartition(".")[0] for name in self.not_targeted}
        biases = {use.parameter for use in self.uses.values() if use.role is Role.BIAS}
        return set(self.not_targeted) | {name for name in biases - chosen if name.rpartition(".")[0] in modules}


def in_order(uses: Sequence[Use], order: Sequence[str]) -> list[Use]:
    """Sort uses by their parameters, and those of one by the place of their matrices in it, the largest first.

    Args:
        uses: The uses.
        order: Names of the parameters; others come last.

    Returns:
        The uses.
    """
    places = {name: number for number, name in enumerate(order)}
    return sorted(uses, key=lambda use: (places.get(use.parameter, len(order)), use.view.start, -use.view.entries))


def merged(observed: Sequence[ObservedUses]) -> ObservedUses:
    """What several passes over different data found.

    Args:
        observed: Of all ranks; at least one.

    Returns:
        The same as one pass over all of the data would have found, or why sharing has to be given up.
    """
    uses = {key: use for found in observed for key, use in found.uses.items()}
    return ObservedUses(
        uses=uses,
        leaders={key: leader for found in observed for key, leader in found.leaders.items()},
        read=sum((Counter(found.read) for found in observed), Counter()),
        tokens=sum((Counter(found.tokens) for found in observed), Counter()),
        shapes={key: shape for found in observed for key, shape in found.shapes.items()},
        all_zero=frozenset(uses).difference(*(found.uses.keys() - found.all_zero for found in observed)),
        not_targeted=frozenset[str]().union(*(found.not_targeted for found in observed)),
        unsupported={name: reason for found in reversed(observed) for name, reason in found.unsupported.items()},
        unshared=next((found.unshared for found in observed if found.unshared), None) or _dissent(observed),
    )


def _dissent(observed: Sequence[ObservedUses]) -> str | None:
    for follower, leader in sorted({pair for found in observed for pair in found.leaders.items()}):
        for rank, found in enumerate(observed):
            size = found.read.get(follower, 0)
            if size != found.read.get(leader, 0) or (size and found.leaders.get(follower) != leader):
                return f"{follower}: it read the same tensor as {leader} on one rank, but not on rank {rank}"
    return None
