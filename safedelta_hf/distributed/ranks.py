"""The processes of a run that work on one model: all collectives stand here."""

import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from safedelta_hf.errors import RankError


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:  # noqa: ANN401
        if not isinstance(value, Tensor):
            return None
        for number, one in enumerate(self._tensors):
            if one is value:
                return number
        self._tensors.append(value)
        return len(self._tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:  # noqa: ANN401
        tensor: Tensor = self._tensors[number]
        return tensor


def packed_value(value: object, tensors: list[Tensor]) -> bytes:
    """Everything of a value but its tensors.

    Args:
        value: Anything that can be pickled.
        tensors: Grows by its tensors.

    Returns:
        What `unpacked_value` needs beside them.
    """
    file = io.BytesIO()
    _Packer(file, tensors).dump(value)
    return file.getvalue()


def unpacked_value(packed: bytes, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401
    """A value put together again.

    Args:
        packed: What `packed_value` returned on another process of the same run.
        tensors: Its tensors, in order.

    Returns:
        The value.
    """
    return _Unpacker(io.BytesIO(packed), tensors).load()


T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long a rank waits for the others: one of them may be factorising a large moment."""


class Ranks:
    """The ranks of a run, or the one process of a run without any; then nothing is exchanged.

    Every collective begins with a check-in over a group of its own, in which each rank says whether it is well. A rank
    that failed inside `together` says so at the next check-in of the others, who then fail with its message instead of
    waiting for it.

    Args:
        control: Group for check-ins and plain objects; None for a single process.
        device: Where tensors are exchanged, if not on any device.
    """

    def __init__(self, control: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self._control = control
        self._device = device
        self.rank = 0 if control is None else dist.get_rank()
        self.size = 1 if control is None else dist.get_world_size()

    @classmethod
    def of_run(cls) -> "Ranks":
        """The ranks that `torch.distributed` was started with; a single process if it was not.

        The first call makes a process group, so all ranks have to come here together.

        Returns:
            The ranks.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return _of_group(dist.distributed_c10d._get_default_group())

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks know.

        Args:
            items: The same on all ranks.

        Returns:
            Every `size`-th of them; none, where there are fewer than ranks.
        """
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """Plain values of all ranks.

        Args:
            value: Anything that can be pickled and holds no tensor.

        Returns:
            One for each rank, in their order.
        """
        if self._control is None:
            return [value]
        self.check_in()
        found: list[Any] = [None] * self.size
        with self._in_contact():
            dist.all_gather_object(found, value, group=self._control)
        return found

    def sum_(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Add up the tensors of all ranks, in place on each of them.

        Args:
            tensor: Contiguous, of the same shape and dtype on all ranks.
            group: The ranks that take part; all of them if None. Ranks of another group do the same meanwhile.

        Returns:
            The tensor.
        """
        if self._control is not None:
            with self._exchanged(tensor) as moved:
                self.check_in()
                with self._in_contact():
                    dist.all_reduce(moved, group=group)
        return tensor

    def assembled(self, rows: Tensor, start: int, size: int, group: dist.ProcessGroup | None = None) -> Tensor:
        """A tensor of which each rank of a group holds some slices along the first dimension.

        Args:
            rows: This rank's slices, [slices, ...], of any dtype.
            start: Where they lie in the whole.
            size: Slices of the whole.
            group: The ranks that hold each slice once between them; all of them if None.

        Returns:
            The whole, on all of them, bit for bit.
        """
        whole = rows.new_zeros((size, *rows.shape[1:]))
        whole[start : start + rows.shape[0]] = rows
        self.sum_(whole.flatten().view(torch.uint8), group)
        return whole

    def joined(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """A tensor of which each rank has computed some slices along the first dimension, in the order of the ranks.

        It moves half of the bytes that `assembled` does, which does not know whose slices are where.

        Args:
            rows: This rank's slices, [slices, ...], of any dtype.
            counts: How many slices each rank has.

        Returns:
            The whole, on all of them, bit for bit.
        """
        if self._control is None:
            return rows
        start = sum(counts[: self.rank])
        whole = rows.new_empty((sum(counts), *rows.shape[1:]))
        whole[start : start + len(rows)] = rows
        size = whole[:1].nbytes
        with self._exchanged(whole.flatten().view(torch.uint8)) as moved:
            self.check_in()
            with self._in_contact():
                parts = torch.split(moved, [count * size for count in counts])
                works = [dist.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(parts) if len(part)]
                for work in works:
                    work.wait()
        return whole

    def all(self, truth: bool) -> bool:
        """Whether something is so on every rank.

        Args:
            truth: Whether it is so on this one.

        Returns:
            The same on all of them.
        """
        return all(self.gather(truth))

    def sum_to_(self, tensor: Tensor, owner: int) -> None:
        """Add up the tensors of all ranks on one of them, in place; those of the others are void afterwards.

        Args:
            tensor: Contiguous, of the same shape and dtype on all ranks.
            owner: The rank that gets the sum.
        """
        if self._control is not None:
            with self._exchanged(tensor) as moved:
                self.check_in()
                with self._in_contact():
                    dist.reduce(moved, dst=owner)

    def broadcast(self, value: T, owner: int, device: torch.device | None = None) -> T:
        """Give all ranks what one of them has.

        Args:
            value: Anything that can be pickled; tensors in it travel as such. Looked at on the owner alone.
            owner: The rank that has it.
            device: Where the others want its tensors; as on the owner if None.

        Returns:
            The owner's value; its tensors have the same strides on all ranks, so that products with them have the same
            bits.
        """
        if self._control is None:
            return value
        tensors: list[Tensor] = []
        packed: list[Any] = [None]
        if self.rank == owner:
            content = packed_value(value, tensors)
            packed = [(content, [(t.shape, t.stride(), t.dtype, t.device.type) for t in tensors])]
        self.check_in()
        with self._in_contact():
            dist.broadcast_object_list(packed, src=owner, group=self._control)
        content, layouts = packed[0]
        for number, (shape, stride, dtype, kind) in enumerate(layouts):
            is_owner = self.rank == owner
            own = tensors[number].detach() if is_owner else torch.empty(shape, dtype=dtype, device=device or kind)
            with self._exchanged(own.contiguous().flatten().view(torch.uint8)) as moved:  # backends know few data types
                self.check_in()  # once there is memory for it on all ranks
                with self._in_contact():
                    dist.broadcast(moved, src=owner)
            if not is_owner:
                tensors.append(_laid_out(own, stride))
        return value if self.rank == owner else unpacked_value(content, tensors)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Fail on all ranks if the block fails on one; it ends on all of them at once.

        Yields:
            Nothing.

        Raises:
            RankError: The block failed on another rank.
            BaseException: It failed on this one.
        """
        try:
            yield
        except BaseException as error:
            if self._control is not None and not _is_told(error):
                _mark_told(error)
                self.check_in(error)
            raise
        self.check_in()

    @contextmanager
    def within_collectives(self) -> Iterator[None]:
        """Let an error in the block end this rank alone, because the others wait for it in collectives of a library.

        They cannot hear of it there: the launcher ends them when this process ends.

        Yields:
            Nothing.
        """
        try:
            yield
        except BaseException as error:
            if self._control is not None:
                _mark_alone(error)
                error.add_note(f"on rank {self.rank}, while the others waited for it in collective operations")
            raise

    def check_in(self, error: BaseException | None = None) -> None:
        """Wait for the other ranks, and hear whether they are well.

        Args:
            error: Why this one is not.

        Raises:
            RankError: Another rank failed.
        """
        if self._control is None:
            return
        with self._in_contact():
            unwell = torch.tensor([error is not None], dtype=torch.int32)
            dist.all_reduce(unwell, op=dist.ReduceOp.MAX, group=self._control)
            if not unwell.item():
                return
            said: list[Any] = [None] * self.size
            message = None if error is None else f"{type(error).__name__}: {error}"
            dist.all_gather_object(said, message, group=self._control)
        if error is None:
            rank, message = next((rank, text) for rank, text in enumerate(said) if text is not None)
            failure = RankError(f"rank {rank} failed: {message}")
            _mark_told(failure)
            raise failure

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        # Where another process has ended, as by a signal, nothing can be done together any more.
        try:
            yield
        except RuntimeError as error:
            lost = RankError(f"rank {self.rank} has lost the others; did one of them end? ({error})")
            _mark_alone(lost)
            raise lost from error

    @contextmanager
    def _exchanged(self, tensor: Tensor) -> Iterator[Tensor]:
        if self._device is None or tensor.device == self._device:
            yield tensor
            return
        moved = tensor.to(self._device)
        yield moved
        tensor.copy_(moved)


def _laid_out(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride or 0 in stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@cache
def _of_group(group: dist.ProcessGroup) -> Ranks:
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    device = None if "gloo" in dist.get_backend_config(group) else dist.distributed_c10d._get_pg_default_device(group)
    return Ranks(control, device)


def is_shared(error: BaseException) -> bool:
    """Whether every rank has failed with an error, so that they can go on together.

    Args:
        error: Any error.

    Returns:
        False if this rank failed alone.
    """
    chain: BaseException | None = error
    while chain is not None:
        if getattr(chain, "_safedelta_alone", False):
            return False
        chain = chain.__cause__ or chain.__context__
    return True


def _mark_told(error: BaseException) -> None:
    error._safedelta_told = True  # type: ignore[attr-defined]


def _mark_alone(error: BaseException) -> None:
    _mark_told(error)
    error._safedelta_alone = True  # type: ignore[attr-defined]


def _is_told(error: BaseException | None) -> bool:
    # An error that was raised from one that the others know of is known too; one that arose while that was dealt with
    # is news to them.
    while error is not None:
        if getattr(error, "_safedelta_told", False):
            return True
        error = error.__cause__
    return False
