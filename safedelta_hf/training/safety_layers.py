"""Which layers of an aligned model tell malicious queries from normal ones: its safety layers.

After Li et al., "Safety Layers in Aligned Large Language Models" (arXiv 2408.17003, ICLR 2025), section 3.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import pstdev
from typing import TYPE_CHECKING, Any, Final, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from safedelta_hf.data.templates import ProcessingClass, prompt_tokens
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ArchitectureError, ConfigurationError, EvaluationError, figures_needed
from safedelta_hf.evaluation import Prompt, Reference, generate_responses, is_refusal, read_prompts
from safedelta_hf.evaluation.hidden_states import last_states
from safedelta_hf.evaluation.likelihood import incoherent
from safedelta_hf.evaluation.questions import PromptSource
from safedelta_hf.folders import read_saved, write_whole
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.modules.evaluating import without_adapters
from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.report.progress import progress_bar
from safedelta_hf.training.angles import AngleCurves, angle_curves, initial_range
from safedelta_hf.weights.journal import Journal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHA_STEP: Final = 0.05
SPREAD: Final = 0.02
"""Standard deviation of the counts of refusals over the ranges, as a share of the queries, at which a factor tells them
apart: 15 to 20 of the paper's 721 queries."""

STRONGEST: Final = 0.5
"""How far from 1 a factor is tried; 1.5 makes Llama-3 babble."""

REACH: Final = 2
"""By how many layers a bound is moved to each side at first."""

INCOHERENT: Final = 0.1
"""Share of the responses that may be gibberish, beyond those without scaling, for a range to be chosen."""

OPENING: Final = 3
"""Words that make the opening of a response."""

Scale = Literal["all", "outputs"]

_OUTPUTS: Final = frozenset("o_proj out_proj c_proj down_proj fc2 fc_out dense_4h_to_h w2".split())
"""What architectures call the projections that end the branches of a layer."""

_OUTPUTS_OF_ATTENTION: Final = frozenset("self_attn self_attention attention".split())
"""What modules are called whose output projection is called "dense"."""


@dataclass(frozen=True, kw_only=True)
class RangeTrial:
    """What the model did with one range of layers scaled.

    Attributes:
        step: What the range was tried for: "unscaled", "alpha", "upper" (bound) or "lower".
        first: First layer.
        last: Last layer, included.
        alpha: The factor.
        refused: Over-refusal queries that were refused.
        incoherent: Responses that were gibberish to the unscaled model.
    """

    step: str
    first: int
    last: int
    alpha: float
    refused: int
    incoherent: int


@dataclass(frozen=True, kw_only=True)
class SafetyLayers:
    """The safety layers of a model, and how they were found.

    Attributes:
        names: Canonical names of all decoder layers.
        first: Number of the first safety layer, from 0; None if the model shows no gap.
        last: Number of the last, included.
        initial: First and last layer of the rise of the gap, where the search began.
        curves: How queries lie to one another; None where the range was given.
        table: What was tried, in this order.
        alpha: Factor by which the parameters of a range were scaled.
        asked: Number of over-refusal queries.
        scale: Which parameters were scaled.
    """

    names: tuple[str, ...]
    first: int | None
    last: int | None
    initial: tuple[int, int] | None = None
    curves: AngleCurves | None = None
    table: tuple[RangeTrial, ...] = ()
    alpha: float | None = None
    asked: int = 0
    scale: Scale = "all"

    def __post_init__(self) -> None:
        if (self.first is None) != (self.last is None):
            raise ConfigurationError(
                f"safety layers: first={self.first!r} and last={self.last!r}; give both or neither"
            )
        if self.first is not None and self.last is not None and not 0 <= self.first <= self.last < len(self.names):
            raise ConfigurationError(
                f"safety layers: {self.first} to {self.last} is no range of the layers 0 to {len(self.names) - 1}"
            )

    @classmethod
    def of(cls, model: nn.Module, first: int, last: int) -> "SafetyLayers":
        """A range that is known already, such as one of the paper's.

        Args:
            model: The model.
            first: Number of the first safety layer, from 0.
            last: Number of the last, included.

        Returns:
            The range.
        """
        return cls(names=tuple(name for name, _ in decoder_layers(model)), first=first, last=last)

    @property
    def numbers(self) -> range:
        """Numbers of the safety layers.

        Raises:
            ConfigurationError: None were found.
        """
        if self.first is None or self.last is None:
            raise ConfigurationError(
                "safety layers: none were found, because the model shows no gap between normal and malicious queries; "
                "is it the aligned model? A range that is known otherwise is SafetyLayers.of(model, first, last)"
            )
        return range(self.first, self.last + 1)

    @property
    def others(self) -> tuple[int, ...]:
        """Numbers of all other layers."""
        return tuple(number for number in range(len(self.names)) if number not in self.numbers)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all.

        Args:
            path: File to write; one that is there is replaced.

        Raises:
            OutputError: It cannot be written.
        """
        write_whole(Path(path), json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "SafetyLayers":
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The safety layers.

        Raises:
            DataError: The file is missing, or is something else.
        """

        def made(content: dict[str, Any]) -> "SafetyLayers":
            curves, initial = content.pop("curves"), content.pop("initial")
            return cls(
                names=tuple(content.pop("names")),
                initial=None if initial is None else (initial[0], initial[1]),
                curves=None if curves is None else _curves_of(curves),
                table=tuple(RangeTrial(**trial) for trial in content.pop("table")),
                **content,
            )

        return read_saved(path, "set of safety layers", made)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw cosines and gap over the layers, and the refusals of each range that was tried.

        Args:
            path: PNG file to write; None writes none.

        Returns:
            The figure.

        Raises:
            ConfigurationError: The range was given, so there is nothing to draw.
        """
        if self.curves is None:
            raise ConfigurationError("safety layers: the range was given and not located, so there are no curves")
        with figures_needed():
            from matplotlib.figure import Figure  # takes a while, and few draw

        figure = Figure(figsize=(12, 4), layout="constrained")
        cosines, gap, ranges = figure.subplots(1, 3)
        _draw_cosines(cosines, self.curves)
        gap.plot(self.curves.gap, marker="o", markersize=3)
        gap.axhline(self.curves.chance, color="0.6", linestyle="--", label="by chance (99 %)")
        gap.set(xlabel="layer", ylabel="angle gap (radians)")
        if self.first is not None and self.last is not None:
            gap.axvspan(self.first - 0.5, self.last + 0.5, color="C2", alpha=0.2, label="safety layers")
        gap.legend(fontsize=8)
        labels = [f"{trial.first}-{trial.last} x{trial.alpha:.2f}" for trial in self.table]
        ranges.barh(range(len(labels)), [trial.refused for trial in self.table])
        ranges.set_yticks(range(len(labels)), labels, fontsize=6)
        ranges.set(xlabel=f"refused of {self.asked}")
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure

    def __str__(self) -> str:
        if self.first is None:
            largest = "" if self.curves is None else f": at most {max(self.curves.gap):.3f} radians"
            return f"no gap between normal and malicious queries{largest}, so no safety layers"
        found = f"safety layers {self.first} to {self.last} of {len(self.names)}"
        if self.alpha is None or not self.table:
            return found
        chosen = next(
            t for t in reversed(self.table) if (t.first, t.last, t.alpha) == (self.first, self.last, self.alpha)
        )
        return (
            f"{found}; scaled by {self.alpha:.2f} they let {chosen.refused} of {self.asked} over-refusal queries be "
            f"refused, unscaled {self.table[0].refused}"
        )


def _curves_of(content: Mapping[str, Any]) -> AngleCurves:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return AngleCurves(**values)


def _draw_cosines(axes: Any, curves: AngleCurves) -> None:  # noqa: ANN401
    for label, mean, spread in (
        ("normal, normal", curves.normal, curves.normal_spread),
        ("normal, malicious", curves.malicious, curves.malicious_spread),
    ):
        axes.plot(mean, label=label)
        low = [value - width for value, width in zip(mean, spread, strict=True)]
        high = [value + width for value, width in zip(mean, spread, strict=True)]
        axes.fill_between(range(len(mean)), low, high, alpha=0.2)
    axes.set(xlabel="layer", ylabel="cosine of the last hidden states")
    axes.legend(fontsize=8)


def locate_safety_layers(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    *,
    normal: PromptSource,
    malicious: PromptSource,
    over_refusal: PromptSource,
    alpha: float | Literal["up", "down"] = "up",
    scale: Scale = "all",
    pairs: int = 500,
    least_gap: float = 0.05,
    max_new_tokens: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> SafetyLayers:
    """Find the layers of an aligned model by which it recognises malicious queries.

    The gap between the angles of normal-malicious and normal-normal pairs begins to rise and levels off over some
    layers (section 3.2); both bounds are then moved to where scaling all parameters in between changes most how many
    harmless queries that look harmful are refused (section 3.4). Every weight is put back bit for bit, also after an
    error. Adapters are disabled meanwhile.

    Args:
        model: The aligned model, in the memory of this process.
        processing_class: Its tokenizer or processor, with a chat template.
        normal: Normal queries; the paper has 100.
        malicious: Malicious queries; the paper has 100.
        over_refusal: Harmless queries that look harmful; the paper has 721.
        alpha: Factor of the weights, or "up" or "down" for the mildest above or below 1, in steps of 0.05, whose counts
            differ enough between ranges. Below 1 the range with the fewest refusals is sought: for models that refuse
            many of these queries already.
        scale: "all" for all parameters of a layer, as in the paper, where factors multiply along a branch; "outputs"
            for the last projection of each branch alone, which scales what both branches add by exactly `alpha`.
        pairs: Pairs of each kind that are drawn.
        least_gap: Below this gap, in radians, at every layer there is none; neither is there if it could be chance.
        max_new_tokens: Tokens of a response by which a refusal is told.
        batch_size: Prompts per forward pass.
        seed: Seed of the pairs.
        progress: Whether to show progress bars.

    Returns:
        The layers; `first` and `last` are None if there is no gap.

    Raises:
        ConfigurationError: A setting is out of range, or the weights are packed or not in this process.
        ArchitectureError: The decoder layers, or with `scale="outputs"` their output projections, are not found.
        EvaluationError: The model babbles whichever layers are scaled.
    """
    sharded = open_model(model)
    _check(sharded, alpha, scale, pairs)
    names = tuple(name for name, _ in decoder_layers(model))
    ask = _Ask(model, processing_class, max_new_tokens, batch_size, progress=progress)
    kinds = read_prompts(normal, "normal"), read_prompts(malicious, "malicious")
    queries = read_prompts(over_refusal, "over_refusal")
    with without_adapters(model):
        states = [ask.states(prompts, desc) for prompts, desc in zip(kinds, ("Normal", "Malicious"), strict=True)]
        curves = angle_curves(*states, pairs=pairs, seed=seed)
        initial = initial_range(curves.gap, least=max(least_gap, curves.chance))
        found = SafetyLayers(names=names, first=None, last=None, curves=curves, asked=len(queries), scale=scale)
        if initial is None:
            return found
        openings = refusal_openings(ask.responses(kinds[1]), ask.responses(kinds[0]))
        ask.judge = lambda response: is_refusal(response) or _opening(response) in openings
        parameters = _scaled_parameters(sharded, names, scale)
        bar = progress_bar(desc="Scaling ranges", unit="range", disable=not progress)
        with Journal(ranks=sharded.ranks) as journal, sharded.ranks.together(), bar:
            sweep = _Sweep(ask, journal, sharded, queries, parameters, bar)
            factor = sweep.alpha(initial, alpha) if isinstance(alpha, str) else alpha
            last = sweep.upper(initial, factor)
            first = sweep.lower((initial[0], last), factor)
    return replace(found, first=first, last=last, initial=initial, alpha=factor, table=tuple(sweep.trials))


def _check(model: ShardedModel, alpha: float | str, scale: str, pairs: int) -> None:
    if not model.is_local:
        raise ConfigurationError(
            f"safety layers: the weights are {model.kind}; locate them in one process with all of them"
        )
    if any(is_quantised(model.live(name)) for name in model.names):
        raise ConfigurationError(
            "safety layers: packed (quantised) weights cannot be scaled; load the model unquantised"
        )
    if alpha not in ("up", "down") and not (isinstance(alpha, float | int) and 0 < alpha and alpha != 1):
        raise ConfigurationError(f"alpha={alpha!r}: expected 'up', 'down', or a positive factor other than 1")
    if scale not in ("all", "outputs"):
        raise ConfigurationError(f"scale={scale!r} is neither 'all' nor 'outputs'")
    if pairs < 1:
        raise ConfigurationError(f"pairs: must be at least 1, got {pairs}")


def refusal_openings(malicious: Sequence[str], normal: Sequence[str]) -> frozenset[str]:
    """How this model begins a refusal: the openings of answers to malicious queries that no normal query gets.

    Args:
        malicious: Responses to malicious queries.
        normal: Responses to normal queries.

    Returns:
        First words, of at least 5 % of the responses to malicious queries each.
    """
    openings = [_opening(response) for response in malicious]
    ordinary = set(map(_opening, normal))
    return frozenset(
        words for words in openings if words not in ordinary and openings.count(words) >= 0.05 * len(openings)
    )


def _opening(response: str) -> str:
    return " ".join(response.lower().split()[:OPENING])


class _Ask:
    """The model, and how it is asked."""

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        max_new_tokens: int,
        batch_size: int,
        *,
        progress: bool,
    ) -> None:
        self.model, self.processing_class, self.progress = model, processing_class, progress
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size
        self.judge: Callable[[str], bool] = is_refusal

    def states(self, prompts: Sequence[Prompt], desc: str) -> Tensor:
        tokens = [prompt_tokens(self.processing_class, prompt.messages) for prompt in prompts]
        states = last_states(self.model, tokens, batch_size=self._batch_size, progress=self.progress, desc=desc)
        return states[:, 0]

    def responses(self, prompts: Sequence[Prompt]) -> list[str]:
        return generate_responses(
            self.model,
            self.processing_class,
            [prompt.messages for prompt in prompts],
            max_new_tokens=self._max_new_tokens,
            batch_size=self._batch_size,
        )

    def incoherent(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> int:
        reference = Reference(self.model, self.processing_class)
        return sum(
            incoherent(
                prompts, responses, self.processing_class, reference, batch_size=self._batch_size, progress=False
            )
        )


class _Sweep:
    """Ranges of layers, each scaled and asked once."""

    def __init__(
        self,
        ask: _Ask,
        journal: Journal,
        model: ShardedModel,
        queries: Sequence[Prompt],
        parameters: Sequence[Sequence[str]],
        bar: Any,  # noqa: ANN401 - of tqdm
    ) -> None:
        self._ask, self._journal, self._model = ask, journal, model
        self._queries, self._parameters, self._bar = queries, parameters, bar
        self.trials: list[RangeTrial] = [self._measured("unscaled", 0, len(parameters) - 1, 1.0)]
        self._most = self.trials[0].incoherent + INCOHERENT * len(queries)

    def alpha(self, start: tuple[int, int], direction: str) -> float:
        # The mildest whose counts of refusals differ enough between ranges; else the strongest that lets it speak.
        sign = 1 if direction == "up" else -1
        factors = [1 + sign * ALPHA_STEP * step for step in range(1, round(STRONGEST / ALPHA_STEP) + 1)]
        ranges = [(first, start[1]) for first in _around(start[0], 0, start[1])]
        if len(ranges) <= REACH:  # at the first layers there is nothing below to compare with
            ranges = [(start[0], last) for last in _around(start[1], start[0], len(self._parameters) - 1)]
        usable = None
        for factor in factors:
            tried = [self._trial("alpha", first, last, factor) for first, last in ranges]
            sound = [trial.refused for trial in tried if trial.incoherent <= self._most]
            if not sound:
                break  # stronger ones will babble too
            usable = factor
            if pstdev(sound) >= SPREAD * len(self._queries):
                return factor
        if usable is None:
            raise self._babble(factors[0])
        return usable

    def upper(self, start: tuple[int, int], factor: float) -> int:
        return self._best(start[1], start[0], len(self._parameters) - 1, factor, lambda last: ("upper", start[0], last))

    def lower(self, start: tuple[int, int], factor: float) -> int:
        return self._best(start[0], 0, start[1], factor, lambda first: ("lower", first, start[1]))

    def _best(
        self, start: int, low: int, high: int, factor: float, trial_of: Callable[[int], tuple[str, int, int]]
    ) -> int:
        # Moved on while the best bound is the last one that was tried, so that both its neighbours are known.
        tried = {bound: self._trial(*trial_of(bound), factor) for bound in _around(start, low, high)}
        while True:
            best = self._chosen(tried, start, factor)
            ahead = [bound for bound in (best - 1, best + 1) if low <= bound <= high and bound not in tried]
            if not ahead:
                return best
            tried |= {bound: self._trial(*trial_of(bound), factor) for bound in ahead}

    def _chosen(self, tried: Mapping[int, RangeTrial], start: int, factor: float) -> int:
        sign = 1 if factor > 1 else -1
        sound = [bound for bound, trial in tried.items() if trial.incoherent <= self._most]
        if not sound:
            raise self._babble(factor)
        return max(sound, key=lambda bound: (sign * tried[bound].refused, -abs(bound - start)))

    def _babble(self, factor: float) -> EvaluationError:
        return EvaluationError(
            f"safety layers: scaled by {factor:g}, the model babbles whichever range is scaled: more than "
            f"{self._most:g} of {len(self._queries)} responses are gibberish to the unscaled model; choose an alpha "
            "closer to 1"
        )

    def _trial(self, step: str, first: int, last: int, factor: float) -> RangeTrial:
        same = [t for t in self.trials if (t.first, t.last, t.alpha) == (first, last, factor)]
        trial = replace(same[0], step=step) if same else self._measured(step, first, last, factor)
        self.trials.append(trial)
        return trial

    def _measured(self, step: str, first: int, last: int, factor: float) -> RangeTrial:
        for name in self._scaled(first, last) if factor != 1 else ():
            parameter = self._model.parameter(name, lent=True)
            self._journal.replace(parameter, parameter.read() * factor)
        responses = self._ask.responses(self._queries)
        self._journal.restore()
        self._bar.update()
        return RangeTrial(
            step=step,
            first=first,
            last=last,
            alpha=factor,
            refused=sum(map(self._ask.judge, responses)),
            incoherent=self._ask.incoherent(self._queries, responses),
        )

    def _scaled(self, first: int, last: int) -> list[str]:
        # A parameter that several layers share is scaled once.
        return list(dict.fromkeys(name for names in self._parameters[first : last + 1] for name in names))


def _around(start: int, low: int, high: int) -> range:
    return range(max(low, start - REACH), min(high, start + REACH) + 1)


def _scaled_parameters(model: ShardedModel, layers: Sequence[str], scale: Scale) -> list[list[str]]:
    own = [[name for name in model.names if name.startswith(f"{layer}.")] for layer in layers]
    if scale == "all":
        return own
    modules = dict(decoder_layers(model.model))
    return [_outputs(layer, modules[layer], names) for layer, names in zip(layers, own, strict=True)]


def _outputs(layer: str, module: nn.Module, names: Sequence[str]) -> list[str]:
    chosen = [name for name in names if _is_output(name.removeprefix(f"{layer}.").split("."))]
    branches = {name.rpartition(".")[0] for name in chosen}
    # What a norm behind a branch makes of it does not depend on its scale.
    behind = [
        key
        for key, child in module.named_children()
        if key.startswith("post_") and key != "post_attention_layernorm" and "norm" in type(child).__name__.lower()
    ]
    if len(branches) < 2 or behind or not getattr(module, "do_layer_norm_before", True):
        found = ", ".join(sorted(branches)) or "none"
        raise ArchitectureError(
            f"{layer}: scale='outputs' needs the projections that end both branches, with nothing behind them; found "
            f"{found}{f', and behind them {behind[0]}' if behind else ''}; use scale='all'"
        )
    return chosen


def _is_output(parts: Sequence[str]) -> bool:
    is_dense = "dense" in parts and parts[parts.index("dense") - 1] in _OUTPUTS_OF_ATTENTION
    return is_dense or any(part.removesuffix("_bias") in _OUTPUTS for part in parts)
