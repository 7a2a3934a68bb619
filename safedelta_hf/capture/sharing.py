"""Which products read the same inputs, so that one moment serves them all."""

from collections import Counter
from collections.abc import Hashable

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from safedelta_hf.capture.tensors import storage_key, weak_storage


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
        leader, size = next(iter(calls)), len(inputs)
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
        self._held.setdefault(storage_key(tensor), weak_storage(tensor))


def _parted(follower: str, leader: str) -> str:
    return f"{follower}: it read the same tensor as {leader} at first, and later did not"
