"""What the package's work costs beside the arithmetic that it cannot do without, as ratios.

    python examples/benchmarks/speed.py [--rows layer reading ...] [--repeats 5] [--quick] [--mergekit PYTHON]

Each line compares two things that are done in turn in one process, at one thread, first one and then the other first:
the median, over the repeats, of the ratio of their CPU times, the least and the largest ratio, and the goal. `--quick`
takes sizes at which the ratios mean nothing, to see that everything runs. `--mergekit` is the Python of an environment
with mergekit (0.1.5 was tried), which then merges the same files beside `files`.

A line is a `Comparison`; a row is a function that makes some, and stands in `ROWS` by its name.
"""

import argparse
import copy
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from safedelta_hf import (
    AutoStrength,
    ProfileConfig,
    Report,
    Ridge,
    SafeDelta,
    SafetyProfile,
    Scale,
    adjust_checkpoint,
    adjust_model,
    collect_profile,
)
from safedelta_hf.adjust.factors import ROUNDING_DAMPING
from safedelta_hf.adjust.loop import adjust_weights
from safedelta_hf.adjust.plan import plan_parameters
from safedelta_hf.adjust.store import WeightStore, Written
from safedelta_hf.core.curvature import factorise, quadratic_loss
from safedelta_hf.core.low_rank import LowRank, Matrix, dense, pays, solves_sooner
from safedelta_hf.core.moment import InputMoment
from safedelta_hf.core.ridge import low_rank_shrinkage, shrinkage, utility_of
from safedelta_hf.deltas.dense import Delta, DenseDelta
from safedelta_hf.deltas.low_rank import FactoredDelta
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.profile.moments import Moments
from safedelta_hf.records.header import ProfileHeader
from safedelta_hf.records.plan import Treatment
from safedelta_hf.records.uses import Role, Use
from safedelta_hf.rules import Rule
from safedelta_hf.weights.digest import digest

VOCABULARY = 512
GROUP = 4
"""Columns that the published sweep treats at once."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two things to do, of which the first is divided by the second.

    Attributes:
        name: What the line says.
        ours: What the package does.
        beside: What it is compared with.
        goal: The ratio to reach, at most.
        cost: What of a piece of work is compared, its CPU time or something else.
    """

    name: str
    ours: Callable[[], object]
    beside: Callable[[], object]
    goal: float
    cost: "Callable[[Callable[[], object]], float]" = field(default_factory=lambda: seconds)


Row = Callable[[bool], Iterator[Comparison]]
"""Makes comparisons, small ones if it is told so."""

ROWS: dict[str, Row] = {}


def row(make: Row) -> Row:
    """Put a row among the others, under the name of its function."""
    ROWS[make.__name__] = make
    return make


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, and what the work says that another one took for it."""
    gc.collect()
    started = time.process_time()
    elsewhere = work()
    return time.process_time() - started + (elsewhere if isinstance(elsewhere, float) else 0.0)


def bytes_read(work: Callable[[], object]) -> float:
    """Bytes that this process asked the system for, from files or the cache of files."""
    before = _read_so_far()
    work()
    return _read_so_far() - before


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def ratios(comparison: Comparison, repeats: int) -> list[float]:
    """One ratio for each repeat, after a first time that does not count, but of a single repeat."""
    if repeats > 1:
        comparison.ours(), comparison.beside()
    found = []
    for number in range(repeats):
        if number % 2:
            beside = comparison.cost(comparison.beside)
            ours = comparison.cost(comparison.ours)
        else:
            ours = comparison.cost(comparison.ours)
            beside = comparison.cost(comparison.beside)
        found.append(ours / beside)
    return found


# One layer


class OneStore(WeightStore):
    """Deltas by name; what becomes of them is dropped."""

    architecture, source = "Plain", "memory"

    def __init__(self, deltas: dict[str, Callable[[], Delta]]) -> None:
        self._deltas = deltas

    def __enter__(self) -> "OneStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def is_tuned(self, name: str) -> bool:
        """All are."""
        return True

    def is_dense(self, name: str) -> bool:
        """All may be."""
        return True

    def delta(self, name: str) -> Delta:
        """The delta of a parameter."""
        return self._deltas[name]()

    def write(self, name: str, delta: Delta) -> Written:
        """Make the weight, and drop it."""
        if isinstance(delta, DenseDelta):
            delta.weight()
        return Written(delta.rounded() if delta.dtype != torch.float32 else delta)

    def restore(self) -> None:
        """Nothing was written over."""


class Layer:
    """A linear layer of random weights and correlated inputs."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2 * size, size, generator=generator)
        inputs *= torch.linspace(0.1, 3.0, size)
        self.moment = InputMoment(total=inputs.T @ inputs, sequences=64, tokens=2 * size)
        self.base = (0.02 * torch.randn(size, size, generator=generator)).to(dtype)
        self.tuned = (self.base.float() + 0.002 * torch.randn(size, size, generator=generator)).to(dtype)
        self.pair = 0.01 * torch.randn(size, 16, generator=generator), torch.randn(16, size, generator=generator)

    @property
    def hessian(self) -> Tensor:
        """Of the safety loss."""
        return self.moment.hessian(torch.device("cpu"))

    def adjusted(self, rule: Rule, *, low_rank: bool = False) -> None:
        """What the package does to it, from delta to weight and record."""
        made = partial(FactoredDelta, *self.pair, 1.0) if low_rank else partial(DenseDelta, self.tuned, self.base)
        adjust_made({"layer": made}, {"layer": self.moment}, {"layer": tuple(self.base.shape)}, rule)


def adjust_made(
    deltas: dict[str, Callable[[], Delta]],
    moments: dict[str, InputMoment],
    shapes: dict[str, tuple[int, ...]],
    rule: Rule,
) -> None:
    """Adjust linear layers that have moments of their own."""
    uses = [
        Use(parameter=name, role=Role.LINEAR, moment=name, view=Role.LINEAR.view(shape), shape=shape)
        for name, shape in shapes.items()
    ]
    told: dict[str, Any] = dict.fromkeys(shapes, "")
    header = ProfileHeader(
        architecture="Plain", base=told, dtypes=told, tokenizer=None, data="", sequences=64, tokens=64, skipped={}
    )
    profile = SafetyProfile(header=header, uses=tuple(uses), moments=Moments(moments))
    plan = plan_parameters(shapes, profile, Treatment())
    adjust_weights(OneStore(deltas), plan, profile, rule, progress=False)


def cholesky_and_solve(hessian: Tensor, delta: Tensor) -> Tensor:
    """Ridge at strength 1 with nothing around it."""
    system = hessian.clone()
    system.diagonal().add_(1.0)
    factor, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(delta.T, factor).T


def published(hessian: Tensor, base: Tensor, tuned: Tensor, strength: float = 0.1, block: int = 2048) -> Tensor:
    """Safe Delta (arXiv 2505.12038) as its authors' code does it: sorted entries, swept columns."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += 0.01 * diagonal.mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    weight, result = base.clone(), base.clone()
    for start in range(0, len(hessian), block):
        stop = min(start + block, len(hessian))
        factor = upper[start:stop, start:stop]
        ratio = factor.diagonal().square().reciprocal()
        wanted = tuned[:, start:stop]
        current = weight[:, start:stop].clone()
        costs = (wanted - current).square() * ratio
        order = ratio.expand_as(costs).flatten().argsort()
        limit = float(ratio.mean()) * strength / 2 * len(base) / 4096
        chosen = costs.flatten()[order].cumsum(0) <= limit
        chosen[len(order) - math.ceil(0.15 * len(order)) :] = False
        kept = torch.zeros(costs.numel(), dtype=torch.bool).index_fill_(0, order[chosen], True).view_as(costs)
        errors = torch.zeros_like(current)
        for first in range(0, stop - start, GROUP):
            group = slice(first, first + GROUP)
            for column in range(first, min(first + GROUP, stop - start)):
                moved = torch.where(kept[:, column], wanted[:, column], current[:, column])
                errors[:, column] = (current[:, column] - moved) / factor[column, column]
            current[:, first + GROUP :] -= errors[:, group] @ factor[group, first + GROUP :]
        result[:, start:stop] = torch.where(kept, wanted, current)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


@row
def layer(quick: bool) -> Iterator[Comparison]:
    """A dense layer beside a bare Cholesky and solve."""
    for size in (64,) if quick else (2048, 4096):
        one = Layer(size)
        bare = partial(cholesky_and_solve, one.hessian, one.tuned - one.base)
        yield Comparison(
            name=f"Ridge, dense layer of {size} / Cholesky and solve",
            ours=partial(one.adjusted, Ridge(strength=1.0)),
            beside=bare,
            goal=1.3,
        )


@row
def published_layer(quick: bool) -> Iterator[Comparison]:
    """A layer beside the published code."""
    size = 64 if quick else 4096
    one = Layer(size)
    sweep = partial(published, one.hessian, one.base, one.tuned)
    for name, work, goal in (
        ("SafeDelta(0.1), dense", partial(one.adjusted, SafeDelta(strength=0.1)), 1 / 8),
        ("Ridge, dense", partial(one.adjusted, Ridge(strength=1.0)), 1 / 8),
        ("SafeDelta(0.1), rank 16", partial(one.adjusted, SafeDelta(strength=0.1), low_rank=True), 1 / 13),
    ):
        yield Comparison(name=f"{name} layer of {size} / published code", ours=work, beside=sweep, goal=goal)


# Reading


def llama(width: int, layers: int) -> PreTrainedModel:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def mixtral(experts: int, width: int, layers: int) -> PreTrainedModel:
    """A Mixtral of random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=2,
        sliding_window=None,
    )
    return MixtralForCausalLM(config).eval()


def sequences(count: int, length: int) -> list[dict[str, list[int]]]:
    """Random tokens."""
    rows = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": one, "labels": one} for one in rows]


def read(model: PreTrainedModel, data: list[dict[str, list[int]]], batch: int) -> SafetyProfile:
    """What the package does."""
    digests = {name: "" for name, _ in model.named_parameters()}
    config = ProfileConfig(holdout=0.0, batch_size=batch)
    return collect_profile(model, data, config=config, digests=digests, progress=False)


@torch.no_grad()
def forward(model: PreTrainedModel, data: list[dict[str, list[int]]], batch: int) -> None:
    """The passes alone."""
    for start in range(0, len(data), batch):
        model(input_ids=torch.tensor([one["input_ids"] for one in data[start : start + batch]]))


def hooked(model: PreTrainedModel, data: list[dict[str, list[int]]], batch: int) -> None:
    """Plain hooks on linear layers that sum the products of their inputs."""
    totals: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, given: tuple[Tensor, ...], _: object) -> None:
        inputs = given[0].flatten(0, -2).float()
        if module not in totals:
            totals[module] = torch.zeros(inputs.shape[1], inputs.shape[1])
        totals[module].addmm_(inputs.T, inputs)

    handles = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        forward(model, data, batch)
    finally:
        for handle in handles:
            handle.remove()


@row
def reading(quick: bool) -> Iterator[Comparison]:
    """Reading safety data beside the forward passes alone, and beside hooks that share nothing."""
    cases = (
        ("512 wide", partial(llama, 32 if quick else 512, 2 if quick else 8), 1.5),
        ("2048 wide", partial(llama, 64 if quick else 2048, 1 if quick else 2), 1.1),
        ("64 experts", partial(mixtral, 4 if quick else 64, 32 if quick else 128, 2), 2.0),
    )
    data, batch = sequences(4 if quick else 16, 16 if quick else 128), 8
    for name, made, goal in cases:
        model = made()
        ours = partial(read, model, data, batch)
        yield Comparison(
            name=f"reading, {name} / forward", ours=ours, beside=partial(forward, model, data, batch), goal=goal
        )
        if "experts" not in name:
            yield Comparison(
                name=f"reading, {name} / plain hooks", ours=ours, beside=partial(hooked, model, data, batch), goal=1.0
            )


# What is read of a profile


@row
def checking(quick: bool) -> Iterator[Comparison]:
    """Reading a moment from its file, checked, beside factoring it."""
    size = 64 if quick else 4096
    moment = Layer(size).moment
    with tempfile.TemporaryDirectory() as folder:
        header = ProfileHeader(
            architecture="Plain",
            base={"layer": "0" * 64},
            dtypes={"layer": "float32"},
            tokenizer=None,
            data="0" * 64,
            sequences=moment.sequences,
            tokens=moment.tokens,
            skipped={},
        )
        shape = (size, size)
        use = Use(parameter="layer", role=Role.LINEAR, moment="layer", view=Role.LINEAR.view(shape), shape=shape)
        profile = SafetyProfile(header=header, uses=(use,), moments=Moments({"layer": moment}))
        profile.save(Path(folder) / "profile")
        system = moment.total + torch.eye(size)
        loaded = SafetyProfile.load(Path(folder) / "profile")
        for name, opened in (
            ("first", lambda: SafetyProfile.load(Path(folder) / "profile")),
            ("again", lambda: loaded),
        ):
            yield Comparison(
                name=f"reading a moment of {size}, {name} / its Cholesky",
                ours=lambda opened=opened: opened().moments["layer"],
                beside=partial(torch.linalg.cholesky_ex, system),
                goal=0.5,
            )


# A search


class Search:
    """A random model, moved by a random delta, whose strength is measured."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        self.base = llama(width, layers)
        config = ProfileConfig(holdout=0.25, batch_size=8)
        self.profile = collect_profile(self.base, sequences(32, length), config=config, progress=False)
        self.tuned = copy.deepcopy(self.base)
        with torch.no_grad():
            for parameter in self.tuned.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        self.trials = 0

    def searched(self, rule: Rule) -> None:
        """What the package does."""
        search = self._adjusted(rule).search
        assert search is not None
        self.trials = len(search.trials)

    def least(self, rule: Rule) -> None:
        """The readings of a search, each twice over, and one adjustment."""
        held_out = self.profile.held_out
        assert held_out is not None
        for _ in range(2 * (self.trials + 2)):  # the base is read twice
            held_out.read(open_model(self.base))
        self._adjusted(rule)

    def _adjusted(self, rule: Rule) -> Report:
        return adjust_model(self.tuned_copy, base=self.base, profile=self.profile, rule=rule, progress=False)

    @property
    def tuned_copy(self) -> PreTrainedModel:
        """A model that may be changed."""
        return copy.deepcopy(self.tuned)


@row
def search(quick: bool) -> Iterator[Comparison]:
    """A search beside twice its forward passes and one adjustment."""
    one = Search(32, 1, 8) if quick else Search(256, 4, 64)
    auto = AutoStrength(precision=1e6 if quick else 1.5)
    for rule in (Ridge, SafeDelta):
        yield Comparison(
            name=f"a search, {rule.name} / twice its readings and one adjustment",
            ours=partial(one.searched, rule(strength=auto)),
            beside=partial(one.least, rule(strength=1.0)),
            goal=1.0,
        )


# Files, and few tokens


class Checkpoints:
    """A base, a fine-tune and a profile of linear layers in files."""

    def __init__(self, folder: Path, size: int, layers: int) -> None:
        self.folder, self.rounds = folder, 0
        one = Layer(size, torch.bfloat16)
        self.names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(layers)]
        self.hessian, told = one.hessian, dict.fromkeys(self.names, digest(one.base))
        header = ProfileHeader(
            architecture="LlamaForCausalLM",
            base=told,
            dtypes=dict.fromkeys(self.names, "bfloat16"),
            tokenizer=None,
            data="0" * 64,
            sequences=one.moment.sequences,
            tokens=one.moment.tokens,
            skipped={},
        )
        shape = tuple(one.base.shape)
        uses = (
            Use(parameter=name, role=Role.LINEAR, moment=name, view=Role.LINEAR.view(shape), shape=shape)
            for name in self.names
        )
        moments = Moments(dict.fromkeys(self.names, one.moment))
        SafetyProfile(header=header, uses=tuple(uses), moments=moments).save(folder / "profile")
        for place, weight in (("base", one.base), ("tuned", one.tuned)):
            (folder / place).mkdir()
            weights, path = {name: weight.clone() for name in self.names}, folder / place / "model.safetensors"
            save_file(weights, path, metadata={"format": "pt"})
            # Of no architecture that mergekit has a list of weights for, so that it merges those that are there.
            (folder / place / "config.json").write_text('{"architectures": ["Layers"], "model_type": "llama"}')

    def adjusted(self, rule: Rule | None = None) -> None:
        """What the package does."""
        self.rounds += 1
        adjust_checkpoint(
            base=self.folder / "base",
            tuned=self.folder / "tuned",
            profile=self.folder / "profile",
            output=self.folder / f"adjusted-{self.rounds}",
            rule=rule or Ridge(strength=1.0),
            progress=False,
        )
        shutil.rmtree(self.folder / f"adjusted-{self.rounds}")

    def merged(self, *, solving: bool = False) -> None:
        """The mean of the two, weight by weight; if asked, with what a Ridge has to factor and solve."""
        with (
            safe_open(self.folder / "base" / "model.safetensors", framework="pt") as base,
            safe_open(self.folder / "tuned" / "model.safetensors", framework="pt") as tuned,
        ):
            found = {}
            for name in self.names:
                one, other = base.get_tensor(name).float(), tuned.get_tensor(name).float()
                found[name] = (one + 0.5 * (other - one)).bfloat16()
                if solving:
                    self.factor(other - one)
        save_file(found, self.folder / "merged.safetensors")

    def factor(self, delta: Tensor) -> None:
        """What a Ridge has to factor and solve of one weight."""
        factorise(self.hessian, ROUNDING_DAMPING)
        cholesky_and_solve(self.hessian, delta)

    def read(self) -> None:
        """All of the inputs, once."""
        for path in self.folder.glob("*/*"):
            if path.parent.name in ("base", "tuned", "profile"):
                path.read_bytes()


@row
def files(quick: bool) -> Iterator[Comparison]:
    """Files to files beside a linear merge of the same files, and what is read beside reading it once."""
    with tempfile.TemporaryDirectory() as folder:
        made = Checkpoints(Path(folder), 64 if quick else 2048, 2 if quick else 6)
        yield Comparison(
            name="files to files / linear merge and factorisations",
            ours=made.adjusted,
            beside=partial(made.merged, solving=True),
            goal=1.5,
        )
        yield Comparison(
            name="files to files, bytes read / once", ours=made.adjusted, beside=made.read, goal=1.5, cost=bytes_read
        )


MERGING = """
import json, sys, time, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(1)
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
for line in sys.stdin:
    models, output = json.loads(line)
    started = time.process_time()
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    run_merge(MergeConfiguration(models=models, merge_method="linear", dtype="bfloat16"), output, options)
    print("CPU seconds", time.process_time() - started, flush=True)
"""
"""What the other process runs: one merge for each line, without the seconds in which it starts."""


class Models:
    """A base and a fine-tune of it, whole models in files, for rules that need no profile."""

    def __init__(self, folder: Path, width: int, layers: int) -> None:
        self.folder = folder
        model = llama(width, layers).to(torch.bfloat16)
        model.save_pretrained(folder / "base")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder / "tuned")

    def scaled(self) -> None:
        """What the package does for the mean of the two."""
        output = self.folder / "adjusted"
        rule = Scale(strength=1.0)
        adjust_checkpoint(
            base=self.folder / "base", tuned=self.folder / "tuned", output=output, rule=rule, progress=False
        )
        shutil.rmtree(output)


@contextmanager
def merging(python: Path) -> Iterator[Callable[[Path], float]]:
    """Mergekit (github.com/arcee-ai/mergekit) in a process of its own, while it is needed.

    Args:
        python: Of the environment that it is installed in.

    Yields:
        A merge of both models in a folder by its `linear` method, which returns the CPU seconds that it took.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([python, "-c", MERGING], **pipes, text=True, env=own) as process:

        def merged(folder: Path) -> float:
            request = [[str(folder / "base"), str(folder / "tuned")], str(folder / "by-mergekit")]
            print(json.dumps(request), file=process.stdin, flush=True)
            for line in process.stdout:
                if line.startswith("CPU seconds "):
                    return float(line.split()[-1])
            raise SystemExit(f"mergekit ended with status {process.wait()}; run its mergekit-yaml to see why")

        yield merged


def mergekit(python: Path, quick: bool) -> Iterator[Comparison]:
    """Files to files beside mergekit's linear merge of the same files; not among `ROWS`, as it may not be installed."""
    with tempfile.TemporaryDirectory() as folder, merging(python) as merge:
        (Path(folder) / "models").mkdir()
        made = Checkpoints(Path(folder), 64 if quick else 2048, 2 if quick else 6)
        models = Models(Path(folder) / "models", 64 if quick else 2048, 1 if quick else 2)
        merged, merged_models = partial(merge, made.folder), partial(merge, models.folder)

        def merged_and_factored() -> float:
            for _ in made.names:
                made.factor(torch.randn(made.hessian.shape))
            return merged()

        for name, ours, beside, goal in (
            ("ridge, files to files / mergekit and factorisations", made.adjusted, merged_and_factored, 1.5),
            ("scale, files to files without data / mergekit", models.scaled, merged_models, 1.5),
            (
                "scale, with a profile / mergekit",
                partial(made.adjusted, Scale(strength=1.0)),
                merged,
                1.5,
            ),
            ("a linear merge of this script / mergekit", made.merged, merged, 1.0),
        ):
            yield Comparison(name=name, ours=ours, beside=beside, goal=goal)


@row
def crossing(quick: bool) -> Iterator[Comparison]:
    """Solving with the factors of few tokens, beside the same with matrices: where it pays, and what is chosen.

    The first of a share is a ridge and its loss, of a matrix that is at hand; the second a task ridge of two factors,
    half of the rows each, whose matrices would have to be formed.
    """
    size = 64 if quick else 1024
    shares = (0.25, 0.75) if quick else (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
    generator = torch.Generator().manual_seed(0)
    for count in (16, size):
        rows = torch.randn(count, size, generator=generator)
        for rank in (int(share * size) for share in shares):
            factor = torch.randn(rank, size, generator=generator) * torch.logspace(0, -1, size)
            one = LowRank(factor=factor)
            safety, task = (LowRank(factor=factor[part::2].contiguous()) for part in (0, 1))
            told = f"rank {rank} of {size}, {count} rows"
            kept, solved = ("factor" if one else "matrix" for one in (pays(rank, size), solves_sooner(rank, size)))
            yield Comparison(
                name=f"ridge and loss, {told} / of the matrix; kept: {kept}",
                ours=partial(solved_of_low_rank, one, None, rows, loss=True),
                beside=partial(solved_of_matrix, dense(one), None, rows, loss=True),
                goal=1.0,
            )
            yield Comparison(
                name=f"task ridge, {told} / its matrices formed; solved: {solved}",
                ours=partial(solved_of_low_rank, safety, task, rows),
                beside=partial(solved_of_matrix, safety, task, rows),
                goal=1.0,
            )


def solved_of_low_rank(hessian: LowRank, task: LowRank | None, rows: Tensor, *, loss: bool = False) -> None:
    """Solve with factors, whether the package would or not."""
    utility = None if task is None else utility_of(task, 0.1)
    assert utility is None or isinstance(utility, LowRank)
    transform = low_rank_shrinkage(hessian, utility, 1.0)
    assert transform is not None
    transform(rows)
    if loss:
        quadratic_loss(lambda form: float(form.form(rows)), hessian)


def solved_of_matrix(hessian: Matrix, task: Matrix | None, rows: Tensor, *, loss: bool = False) -> None:
    """Solve with matrices, formed where they are not at hand."""
    utility = None if task is None else utility_of(dense(task), 0.1)
    shrinkage(dense(hessian), utility, 1.0)(rows)
    if loss:
        quadratic_loss(lambda form: float(form.form(rows)), hessian)


@row
def few_tokens(quick: bool) -> Iterator[Comparison]:
    """An adapter on one decoder layer of a 7B, of a profile of 2,000 tokens, beside the same with matrices."""
    hidden, inner, tokens = (64, 176, 20) if quick else (4096, 11008, 2000)
    generator = torch.Generator().manual_seed(0)
    few = {
        name: InputMoment(
            total=LowRank(factor=torch.randn(tokens, size, generator=generator) * torch.logspace(0, -2, size)),
            sequences=64,
            tokens=tokens,
        )
        for name, size in (("attention", hidden), ("output", hidden), ("mlp", hidden), ("down", inner))
    }
    whole = {name: replace(moment, total=dense(moment.total)) for name, moment in few.items()}
    deltas: dict[str, Callable[[], Delta]] = {}
    shapes = {name: (hidden, len(moment.total)) for name, moment in few.items()}
    for name, (rows, columns) in shapes.items():
        pair = 0.01 * torch.randn(rows, 16, generator=generator), torch.randn(16, columns, generator=generator)
        deltas[name] = partial(FactoredDelta, *pair, 1.0)
    yield Comparison(
        name=f"adapter on a layer of {hidden} and {inner}, {tokens} tokens / with matrices",
        ours=partial(adjust_made, deltas, few, shapes, Ridge(strength=1.0)),
        beside=partial(adjust_made, deltas, whole, shapes, Ridge(strength=1.0)),
        goal=60 / 406,
    )


# What grows with layers, experts and sequences; each beside half of it


def random_layers(count: int, size: int) -> Callable[[], None]:
    """Adjust many small layers."""
    moment = Layer(size).moment
    base = torch.zeros(size, size)
    tuned = torch.full_like(base, 0.01)
    names = [f"layer{number}" for number in range(count)]
    return partial(
        adjust_made,
        {name: partial(DenseDelta, tuned, base) for name in names},
        dict.fromkeys(names, moment),
        dict.fromkeys(names, (size, size)),
        SafeDelta(strength=1.0),
    )


@row
def sweeps(quick: bool) -> Iterator[Comparison]:
    """Twice as much beside once: 2 is linear."""
    layers, experts, count = (2, 2, 2) if quick else (400, 64, 32)
    yield Comparison(
        name=f"adjusting {2 * layers} layers / {layers}",
        ours=random_layers(2 * layers, 16),
        beside=random_layers(layers, 16),
        goal=2.0,
    )
    short = sequences(4, 16)
    tokens = sequences(8, 8) if quick else sequences(32, 64)
    yield Comparison(
        name=f"reading with {2 * experts} experts / {experts}",
        ours=partial(read, mixtral(2 * experts, 16, 1), tokens, 8),
        beside=partial(read, mixtral(experts, 16, 1), tokens, 8),
        goal=2.0,
    )
    small = llama(16, 2)
    yield Comparison(
        name=f"reading {2 * count} sequences / {count}",
        ours=partial(read, small, sequences(2 * count, 16), 1),
        beside=partial(read, small, sequences(count, 16), 1),
        goal=2.0,
    )
    yield Comparison(
        name=f"reading with {2 if quick else 32} layers / {1 if quick else 16}",
        ours=partial(read, llama(16, 2 if quick else 32), short, 1),
        beside=partial(read, llama(16, 1 if quick else 16), short, 1),
        goal=2.0,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "mergekit"])
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="Of an environment with mergekit.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="Sizes that only show that it runs.")
    options = parser.parse_args()
    rows = ROWS if options.mergekit is None else ROWS | {"mergekit": partial(mergekit, options.mergekit)}
    if "mergekit" in (options.rows or ()) and options.mergekit is None:
        parser.error("--rows mergekit needs --mergekit PYTHON")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| what / beside what | median | least | largest | goal |\n|---|---|---|---|---|", flush=True)
    for name in options.rows or rows:
        for comparison in rows[name](options.quick):
            found = ratios(comparison, options.repeats)
            figures = (statistics.median(found), min(found), max(found), comparison.goal)
            print(f"| {comparison.name} | {' | '.join(f'{figure:.2f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    main()
