"""A model whose shapes share out badly, and what every backend has to do with it."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safedelta_hf.capture.views import storage_key, weak_storage
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model

TOKENS = torch.arange(12).reshape(2, 6) % 7
RATE = 0.1


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 7)
        self.gate = nn.Linear(6, 1)  # fewer rows than ranks
        self.down = nn.Linear(7, 6)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.tanh(self.up(y)) * self.gate(y))


class Tower(nn.Module):
    """Odd numbers of rows, a single one, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(49, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 49, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def logits_of(outputs) -> Tensor:
    return getattr(outputs, "logits", outputs).float()


def loss_of(outputs) -> Tensor:
    return logits_of(outputs).square().mean()


def stepping(model: nn.Module) -> Callable[[Tensor], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(tokens: Tensor) -> None:
        loss_of(model(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def passed(layout: str, check: str) -> None:
    """Tell the test that a check was passed."""
    if dist.get_rank() == 0:
        print(f"passed {layout}.{check}", flush=True)


class Watcher(TorchDispatchMode):
    """Notes operations, with the parameters that they use, except when it is paused."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.noted: list[tuple[str, tuple[str, ...]]] = []
        self._shown: dict[tuple[int, int, int], tuple[object, str]] = {}
        self._paused = False

    def track(self, tensor: Tensor, name: str) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            assert torch.equal(tensor, self.values[name].to(tensor.dtype)), f"{name} is shown as another tensor"
        self._shown[_key(tensor)] = weak_storage(tensor), name

    def track_when_loaded(self, parameter: Tensor, name: str) -> None:
        """The modules here are all called, so that their parameters are shown."""

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            names = tuple(self._shown[_key(tensor)][1] for tensor in tensors if _key(tensor) in self._shown)
            self.noted.append((str(func), names))
        return result


def _key(tensor: Tensor) -> tuple[int, int, int]:
    return storage_key(tensor), tensor.storage_offset(), tensor.numel()


class Checks:
    """A model on all ranks, and the same one in this process alone, kept in step.

    Each check that passed is printed by name; the first that does not ends the process.
    """

    def __init__(
        self,
        kind: str,
        layout: str,
        model: nn.Module,
        twin: nn.Module,
        step: Callable[[Tensor], None],
        state: Callable[[], dict[str, Tensor]] | None = None,
        tolerance: float = 1e-6,
    ) -> None:
        self.model, self.twin, self.step = model, twin, step
        self.state = state or model.state_dict
        self.report, self.tolerance = partial(passed, layout), tolerance
        self.opened: ShardedModel = open_model(model)
        assert self.opened.kind == kind, self.opened.kind
        self.train_twin = stepping(twin)

    NAMES = (
        "read",
        "read_after_write",
        "write_before_the_first_forward",
        "write_after_a_forward_without_backward",
        "read_after_a_forward_without_backward",
        "read_after_training",
        "the_next_step_starts_from_what_was_written",
        "forward_after_training",
        "state",
        "watched",
        "read_after_watching",
    )

    def all(self) -> None:
        self.read("read")
        self.write(1)
        self.read("read_after_write")
        self.agree("write_before_the_first_forward")
        self.write(2)
        self.agree("write_after_a_forward_without_backward")
        self.read("read_after_a_forward_without_backward")
        self.train()
        self.read("read_after_training", exact=False)
        self.write(3)
        self.train()
        self.read("the_next_step_starts_from_what_was_written", exact=False)
        self.write(4)
        self.agree("forward_after_training")
        self.saved()
        self.watched()
        self.read("read_after_watching")

    def read(self, name: str, exact: bool = True) -> None:
        parameters = dict(self.twin.named_parameters())
        assert set(self.opened.all_names) == set(parameters), self.opened.all_names
        for key, parameter in parameters.items():
            shard, value = self.opened.shard(key), self.opened.read(key)
            assert self.opened.shape(key) == parameter.shape, key
            assert self.opened.dtype(key) == value.dtype == parameter.dtype, key
            assert self.opened.device(key) == value.device, key
            assert shard.size == len(parameter), key
            wanted = parameter.detach()[shard.start : shard.stop]
            assert value.shape == wanted.shape, key
            if exact:
                assert torch.equal(value.view(torch.uint8), wanted.view(torch.uint8)), key
            else:
                torch.testing.assert_close(value, wanted, rtol=self.tolerance, atol=self.tolerance, msg=key)
        self.report(name)

    def write(self, seed: int) -> None:
        """Write every parameter, in float32 whatever its own precision; one entry to the zero that has a sign."""
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in self.twin.named_parameters():
            value = parameter.detach().float() + 0.3 * torch.randn(parameter.shape, generator=generator)
            value.view(-1)[0] = -0.0
            parameter.data.copy_(value)
            shard = self.opened.shard(key)
            self.opened.write(key, value[shard.start : shard.stop])

    def agree(self, name: str) -> None:
        with torch.no_grad():
            ours, theirs = logits_of(self.model(TOKENS)), logits_of(self.twin(TOKENS))
        torch.testing.assert_close(ours, theirs, rtol=self.tolerance, atol=self.tolerance)
        self.report(name)

    def saved(self) -> None:
        """What the backend itself would save is what was written."""
        self.write(5)
        found = self.state()
        if found:  # on some, the main rank alone gets it
            for key, parameter in self.twin.named_parameters():
                value = found[key].full_tensor() if isinstance(found[key], DTensor) else found[key]
                assert torch.equal(value, parameter), key
        assert found or dist.get_rank(), "the main rank has a state"
        self.report("state")

    def train(self) -> None:
        self.step(TOKENS)
        self.train_twin(TOKENS)

    def watched(self) -> None:
        """The watcher sees the operations of the model, and no others, on the parameters that they use."""
        alone = self._watching(self.twin, open_model(self.twin))
        ours = self._watching(self.model, self.opened)
        differences = [pair for pair in zip(ours, alone, strict=False) if pair[0] != pair[1]]
        assert ours == alone, (len(ours), len(alone), differences[:4])
        used = {name for _, names in alone for name in names}
        assert used == set(self.opened.all_names), used
        self.report("watched")

    def _watching(self, model: nn.Module, opened: ShardedModel) -> list[tuple[str, tuple[str, ...]]]:
        values = {key: parameter.detach().clone() for key, parameter in self.twin.named_parameters()}
        watching = Watcher(values)
        with torch.no_grad(), opened.tracked_by(watching), watching:
            model(TOKENS)
            model(TOKENS)
        return watching.noted
