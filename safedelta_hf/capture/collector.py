"""Sums the moments of all weights while a model runs, and says which products read the same inputs."""

import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safedelta_hf.capture.views import ParameterView, storage_key, weak_storage
from safedelta_hf.core.finite import is_finite
from safedelta_hf.core.low_rank import LowRank, Matrix, pays
from safedelta_hf.core.moment import add_outer_, fill_lower_
from safedelta_hf.errors import NumericalError
from safedelta_hf.profile.moments import MomentStorage
from safedelta_hf.records.uses import MatrixView, Role, Use, moment_key


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


class SharedInputs:
    """Recognises the same inputs when they are read again within one forward pass.

    Inputs are the same if they are the same view of the same unchanged memory, or of copies of it. The first to read
    them leads; others follow it for good, and have no moment of their own.

    Attributes:
        leaders: Key of the leader, by key of its followers.
        sizes: Inputs that each product has read so far, by key.
    """

    def __init__(self) -> None:
        self.leaders: dict[str, str] = {}
        self.sizes: Counter[str] = Counter()
        self._obstacle: str | None = None
        self._calls: dict[Hashable, Counter[str]] = {}  # how often each product has read some inputs, the leader first
        self._copies: dict[int, tuple[int, Hashable]] = {}
        self._held: dict[int, StorageWeakRef] = {}

    def start_batch(self) -> None:
        """Forget which inputs were read: identities hold within one forward pass only."""
        self._calls.clear()
        self._copies.clear()
        self._held.clear()

    def copied(self, source: Tensor, copy: Tensor) -> None:
        """Remember that a new tensor holds the values of another.

        Args:
            source: What was copied.
            copy: Memory of its own, the same shape.
        """
        identity = self._identity(source)
        self._hold(copy)
        self._copies[storage_key(copy)] = (copy._version, identity)

    def follows(self, key: str, inputs: Tensor) -> bool:
        """Whether a product reads what its leader has read, and becomes its follower if it is new.

        Args:
            key: Key of the product.
            inputs: What it reads, [tokens, columns].

        Returns:
            Whether these inputs are in the leader's moment already. Once a follower has read something else than its
            leader, all moments are void, and nothing more is added to them.
        """
        if self._obstacle is not None:
            return True
        calls = self._calls.setdefault(self._identity(inputs), Counter())
        calls[key] += 1
        leader, size = next(iter(calls)), inputs.shape[0]
        is_follower = self.leaders.get(key) == leader and calls[key] <= calls[leader]
        is_new = leader != key and key not in self.sizes and self.sizes[leader] == size
        if key in self.leaders and not is_follower:
            if inputs.any():  # zeros, as stand in for a token before the first, add nothing to any moment
                self._obstacle = _parted(key, self.leaders[key])
            return True
        self.sizes[key] += size
        if is_new:
            self.leaders[key] = leader
        return is_follower or is_new

    @property
    def is_void(self) -> bool:
        """Whether a follower has read something else than its leader."""
        return self._obstacle is not None

    @property
    def obstacle(self) -> str | None:
        """Which follower has not read just what its leader has read by the end; None if all have."""
        if self._obstacle is None:
            for follower, leader in self.leaders.items():
                if self.sizes[follower] != self.sizes[leader]:
                    return _parted(follower, leader)
        return self._obstacle

    def _identity(self, tensor: Tensor) -> Hashable:
        self._hold(tensor)
        key = storage_key(tensor)
        version, source = self._copies.get(key, (None, None))
        memory = source if version == tensor._version else (key, tensor._version)
        return memory, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    def _hold(self, tensor: Tensor) -> None:
        # As long as a weak reference is held, no other storage gets this address.
        key = storage_key(tensor)
        if key not in self._held:
            self._held[key] = weak_storage(tensor)


def _parted(follower: str, leader: str) -> str:
    return f"{follower}: it read the same tensor as {leader} at first, and later did not"


class MomentCollector:
    """Moments of all that is observed to happen to a model's weights, and the uses that they belong to.

    Products that read the same inputs share the moment of the first of them.

    Args:
        parameters: Parameters, or anything of their shape and device, by canonical name; tied ones have one.
        storage: Where the moments are held.
        head: Name of the output projection's weight, if the model has one.
        chosen: Names of those whose products are read.
        share: Whether products may share a moment.
        keep_few: Whether inputs may be kept in place of their moment while they are few.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        storage: MomentStorage,
        *,
        head: str | None,
        chosen: Collection[str],
        share: bool,
        keep_few: bool = False,
    ) -> None:
        self._keep_few = keep_few
        self._few: dict[str, list[Tensor]] = {}
        self._parameters = parameters
        self._head = head
        self._chosen = chosen
        self._not_targeted: set[str] = set()
        self._storage = storage
        self._totals: dict[str, Tensor] = {}
        self._tokens: Counter[str] = Counter()
        self._uses: dict[str, Use] = {}
        self._product_keys: dict[tuple[str, Role | None, MatrixView], str] = {}
        self._batch, self._length = 1, 0
        self.shared = SharedInputs() if share else None

    def start_batch(self, size: int, length: int) -> None:
        """Begin another forward pass.

        Args:
            size: Sequences in the batch.
            length: Tokens in each of them.
        """
        if self.shared is not None:
            self.shared.start_batch()
        self._batch, self._length = size, length

    def product(self, weight: ParameterView, inputs: Tensor, role: Role | None = None) -> None:
        """Add the inputs of a linear map.

        Args:
            weight: The matrix [rows, columns].
            inputs: [tokens, columns].
            role: What to call it; linear, or the head, if None.
        """
        if weight.parameter not in self._chosen:
            self._not_targeted.add(weight.parameter)
            return
        if not inputs.shape[0]:
            return
        key = self._product_key(weight.parameter, role, weight.matrix)
        if weight.factor not in (1.0, -1.0):
            inputs = inputs * weight.factor
        self._add_inputs(key, inputs, may_follow=role is None)

    def packed_product(self, weight: str, bias: str | None, inputs: Tensor) -> None:
        """Add the inputs of a linear layer whose weight is packed.

        Args:
            weight: Name of the weight, which goes by its shape [out, in] however it is stored.
            bias: Name of the bias, if it has one.
            inputs: [tokens, in].
        """
        if weight not in self._chosen:
            self._not_targeted.add(weight)
        else:
            self._add_inputs(self._key(weight, self._role(weight)), inputs, may_follow=True)
        if bias is not None:
            key = self._key(bias, Role.BIAS)
            self._total(key, (1,), inputs.device).add_(len(inputs))
            self._tokens[key] += len(inputs)

    def scale(self, weight: ParameterView, squares: Tensor, repetitions: int) -> None:
        """Add what a weight is multiplied with elementwise.

        Args:
            weight: Any entries of a parameter.
            squares: For each of them, the sum of the squares.
            repetitions: How often each was used.
        """
        key = self._key(weight.parameter, Role.SCALE)
        self._add_entries(key, weight, squares)
        self._tokens[key] += repetitions

    def offset(self, weight: ParameterView, repetitions: int) -> None:
        """Count how often a weight was added to something.

        Args:
            weight: Any entries of a parameter; if they lie along one dimension, they are a bias.
            repetitions: How often each was added.
        """
        if not repetitions:
            return
        own, _ = weight.split()
        count = repetitions * weight.factor**2
        device = self._parameters[weight.parameter].device
        if len(own) > 1:
            key = self._key(weight.parameter, Role.OFFSET)
            ones = torch.ones([weight.shape[n] for n in own], device=device)
            self._add_entries(key, weight, ones * repetitions)
        else:
            rows, stride = (weight.shape[own[0]], weight.strides[own[0]]) if own else (1, 1)
            if weight.slopes is not None:
                count *= float(weight.entries(weight.slopes).square().mean())
            view = MatrixView(start=weight.start, rows=rows, columns=1, row_stride=stride, column_stride=1)
            key = self._key(weight.parameter, Role.BIAS, view)
            self._total(key, (1,), device).add_(count)
        self._tokens[key] += repetitions

    def lookup(self, weight: ParameterView, rows: Tensor) -> None:
        """Count how often each row of a table is looked up.

        Args:
            weight: The table [rows, features].
            rows: Their numbers, any shape.
        """
        key = self._key(weight.parameter, Role.EMBEDDING)
        # Positions are looked up once for a whole batch, and stand for each of its sequences.
        copies = self._batch if rows.numel() == self._length else 1
        counts = torch.bincount(rows.flatten(), minlength=weight.shape[0]).to(torch.float32) * copies
        total = self._total(key, (weight.shape[0],), counts.device)
        total.add_(counts.to(total.device))
        self._tokens[key] += rows.numel() * copies

    def is_table(self, weight: ParameterView) -> bool:
        """Whether a weight is a whole parameter of rows.

        Args:
            weight: Any entries of a parameter.

        Returns:
            Whether its rows can be looked up by number.
        """
        shape = tuple(self._parameters[weight.parameter].shape)
        return len(shape) == 2 and weight.shape == shape and weight.start == 0 and weight.strides[-1] in (0, 1)

    def observed(self, unsupported: Mapping[str, str]) -> ObservedUses:
        """What was found, but for the sums.

        Args:
            unsupported: Why parameters that were used were not read, by name.

        Returns:
            Plain data.

        Raises:
            NumericalError: The inputs of a weight held NaN or Inf.
        """
        for key, tensors in self._read().items():
            if not all(map(is_finite, tensors)):
                raise NumericalError(
                    f"{key}: NaN or Inf in the inputs of this layer while the safety data was read; "
                    "check the base model, or load it in float32 or bfloat16"
                )
        shared = self.shared
        leaders = {} if shared is None else dict(shared.leaders)
        return ObservedUses(
            uses=dict(self._uses),
            leaders=leaders,
            read={} if shared is None else dict(shared.sizes),
            tokens=dict(self._tokens),
            shapes={key: tuple(total.shape) for key, total in self._totals.items()}
            | {key: (kept[0].shape[1],) * 2 for key, kept in self._few.items()},
            all_zero=frozenset(self._all_zero(leaders)),
            not_targeted=frozenset(self._not_targeted),
            unsupported=dict(unsupported),
            unshared=None if shared is None else shared.obstacle,
        )

    def take(self) -> dict[str, Matrix]:
        """Hand over the sums.

        Returns:
            The moment of each use that has one of its own, by key; the collector keeps none.
        """
        totals: dict[str, Matrix] = {}
        for key, total in self._totals.items():
            if total.ndim == 2:
                fill_lower_(total)
            totals[key] = total
        self._totals = {}
        while self._few:
            key, kept = self._few.popitem()
            totals[key] = LowRank(factor=torch.cat(kept).to(torch.float32))
        return totals

    def _read(self) -> dict[str, list[Tensor]]:
        # What each moment holds so far: its sum, or the inputs while they are few.
        return {key: [total] for key, total in self._totals.items()} | self._few

    def _all_zero(self, leaders: Mapping[str, str]) -> Iterator[str]:
        parts = {
            key: leaders.get(key, key) for key, use in self._uses.items() if not use.view.covers(math.prod(use.shape))
        }
        read = self._read()
        empty = {key for key in set(parts.values()) & read.keys() if not any(tensor.any() for tensor in read[key])}
        for key, leader in parts.items():
            if leader in empty:
                yield key

    def _role(self, name: str, view: MatrixView | None = None) -> Role:
        shape = self._parameters[name].shape
        # Of one input or one output both views can be equal, and never mean two things.
        if len(shape) == 2 and view == Role.CONV1D.view(shape) != Role.LINEAR.view(shape):
            return Role.CONV1D
        return Role.HEAD if name == self._head else Role.LINEAR

    def _product_key(self, name: str, role: Role | None, view: MatrixView) -> str:
        met = (name, role, view)
        key = self._product_keys.get(met)
        if key is None:
            key = self._product_keys[met] = self._key(name, role or self._role(name, view), view)
        return key

    def _key(self, name: str, role: Role, view: MatrixView | None = None) -> str:
        shape = tuple(self._parameters[name].shape)
        view = role.view(shape) if view is None else view
        key = moment_key(name, role, view, shape)
        if key not in self._uses:
            self._uses[key] = Use(parameter=name, role=role, moment=key, view=view, shape=shape)
        return key

    def _add_inputs(self, key: str, inputs: Tensor, *, may_follow: bool) -> None:
        if not (may_follow and self.shared is not None and self.shared.follows(key, inputs)):
            self._add_rows(key, inputs)
        self._tokens[key] += inputs.shape[0]

    def _add_rows(self, key: str, inputs: Tensor) -> None:
        count, columns = inputs.shape
        if self._keep_few and key not in self._totals:
            count += sum(rows.shape[0] for rows in self._few.get(key, ()))
            if pays(count, columns) and self._storage.takes(inputs):
                self._few.setdefault(key, []).append(inputs.detach().clone())
                return
        total = self._total(key, (columns, columns), inputs.device)
        for rows in self._few.pop(key, ()):  # one by one, as if they had been added at once
            add_outer_(total, rows)
            self._storage.release(rows)
        add_outer_(total, inputs)

    def _add_entries(self, key: str, weight: ParameterView, squares: Tensor) -> None:
        total = self._total(key, (self._parameters[weight.parameter].numel(),), squares.device)
        entries = weight.entries(total)
        values = squares.to(torch.float32).reshape(entries.shape) * weight.factor**2
        if weight.slopes is not None:
            values = values * weight.entries(weight.slopes).square().to(values.device)
        entries.add_(values.to(total.device))

    def _total(self, key: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if key not in self._totals:
            self._totals[key] = self._storage.allocate(shape, device)
        return self._totals[key]
