"""What one pass over data found about the uses of weights, but for the sums: plain data, which ranks exchange."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safedelta_hf.records import Part, Role, Use

UseOf = tuple[str, Role, Part | None]
"""A use without its moment: the parameter, how it meets its inputs, and which part of it."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was observed to happen to the weights of a model.

    Attributes:
        keys: Key of each use, in the order in which they were first met.
        leaders: Whose moment serves a product, by key of those that follow another.
        read: Inputs that each product read, of those that may share a moment, by key.
        tokens: Inputs of each use, by key.
        shapes: Shape of each moment that there is, by key.
        blank: Keys of the moments of parts that are zero.
        left: Names of what was multiplied as a matrix and not chosen.
        unread: Why parameters that were used were not read, by name.
        unshared: Why products cannot share moments as they did; None if they can.
    """

    keys: Mapping[UseOf, str]
    leaders: Mapping[str, str] = field(default_factory=dict)
    read: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    blank: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    unread: Mapping[str, str] = field(default_factory=dict)
    unshared: str | None = None

    def uses(self, order: Sequence[str], chosen: frozenset[str]) -> list[Use]:
        """How each parameter was used.

        Args:
            order: Names of all parameters.
            chosen: Names of those whose products are read.

        Returns:
            The uses, in the order of the parameters. A part of which nothing but zeros was asked, as an expert is
            that no token was routed to, has none.
        """
        places = {name: number for number, name in enumerate(order)}
        found, untargeted = [], self.untargeted(chosen)
        for (name, role, part), key in self.keys.items():
            moment = self.leaders.get(key, key)
            is_left = role is Role.BIAS and name in untargeted
            if not is_left and (part is None or moment not in self.blank):
                found.append(Use(parameter=name, role=role, moment=moment, part=part))
        return sorted(found, key=lambda use: (places[use.parameter], -1 if use.part is None else use.part.start))

    def untargeted(self, chosen: frozenset[str]) -> set[str]:
        """Names of what is multiplied as a matrix but was not chosen, and of the biases that go with it.

        Args:
            chosen: Names of the parameters whose products are read.

        Returns:
            The names.
        """
        modules = {name.rpartition(".")[0] for name in self.left}
        biases = {name for name, role, _ in self.keys if role is Role.BIAS and name.rpartition(".")[0] in modules}
        return set(self.left) | {name for name in biases if name not in chosen}

    def renamed(self, names: Mapping[UseOf, str]) -> "Findings":
        """The same with other keys.

        Args:
            names: The key of each use.

        Returns:
            New findings.
        """
        new = {key: names[use] for use, key in self.keys.items()}
        return Findings(
            keys={use: names[use] for use in self.keys},
            leaders={new[follower]: new[leader] for follower, leader in self.leaders.items()},
            read={new[key]: size for key, size in self.read.items()},
            tokens={new[key]: count for key, count in self.tokens.items()},
            shapes={new[key]: shape for key, shape in self.shapes.items()},
            blank=frozenset(new[key] for key in self.blank),
            left=self.left,
            unread=self.unread,
            unshared=self.unshared,
        )


def common_keys(findings: Sequence[Findings]) -> dict[UseOf, str]:
    """One key for each use, although ranks that met uses in another order may have given it another.

    Args:
        findings: Of all ranks.

    Returns:
        The keys, in the order in which the first rank that met them did.
    """
    names: dict[UseOf, str] = {}
    for found in findings:
        for use, key in found.keys.items():
            if use not in names:
                names[use] = free_key(key, use[1], set(names.values()))
    return names


def free_key(key: str, role: Role, taken: set[str]) -> str:
    """A key that no other use has.

    Args:
        key: The key that is wanted.
        role: Role of its use.
        taken: Keys of others.

    Returns:
        The key, with the role behind it where needed.
    """
    while key in taken:
        key = f"{key}:{role}"
    return key


def merged(findings: Sequence[Findings]) -> Findings:
    """What several passes over different data found.

    Args:
        findings: Of all ranks, with common keys; at least one.

    Returns:
        The same as one pass over all of the data would have found, or why sharing has to be given up.
    """
    names = common_keys(findings)
    shapes = {key: shape for found in findings for key, shape in found.shapes.items()}
    unread = {name: reason for found in reversed(findings) for name, reason in found.unread.items()}
    filled = {key for found in findings for key in found.shapes if key not in found.blank}
    return Findings(
        keys=names,
        leaders={key: leader for found in findings for key, leader in found.leaders.items()},
        read=sum((Counter(found.read) for found in findings), Counter()),
        tokens=sum((Counter(found.tokens) for found in findings), Counter()),
        shapes=shapes,
        blank=frozenset(shapes.keys() - filled),
        left=frozenset[str]().union(*(found.left for found in findings)),
        unread=unread,
        unshared=next((found.unshared for found in findings if found.unshared), None) or _dissent(findings),
    )


def _dissent(findings: Sequence[Findings]) -> str | None:
    for follower, leader in sorted({pair for found in findings for pair in found.leaders.items()}):
        for rank, found in enumerate(findings):
            size = found.read.get(follower, 0)
            if size != found.read.get(leader, 0) or (size and found.leaders.get(follower) != leader):
                return f"{follower}: it read the same tensor as {leader} on one rank, but not on rank {rank}"
    return None
