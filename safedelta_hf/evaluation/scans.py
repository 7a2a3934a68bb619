"""Fewer false refusals without training: activations are steered away from refusal where a query is harmless.

After Cao et al., "SCANS: Mitigating the Exaggerated Safety for LLMs via Safety-Conscious Activation Steering"
(arXiv 2408.11491, AAAI 2025).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from safedelta_hf.data.templates import ProcessingClass, prompt_tokens, tokenizer_of
from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.evaluation.hidden_states import hidden_of, last_states, layer_range
from safedelta_hf.evaluation.questions import Prompt, PromptSource, read_prompts
from safedelta_hf.folders import complete_file
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.modules.names import base_modules

AFFIRMATION: Final = "Sure"
"""What is appended to a prompt: how the hidden states move to it tells harmful queries from harmless ones."""

HELD_OUT: Final = 4
"""One anchor in so many is in no vector; the threshold is fitted on these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scans:
    """What steers one model.

    Attributes:
        directions: Unit vector from harmless to harmful for each steered layer, [layers, hidden].
        transitions: Mean move of the hidden states of harmful queries to the affirmation, for each layer by which
            queries are told apart, [layers, hidden].
        first: Number of the first layer of both.
        count: Number of decoder layers of the model.
        multiplier: Length of the step along a direction.
        threshold: Score from which a query is harmful.
        affirmation: Token ids of what is appended.
        batch_size: Prompts per forward pass that tells them apart.
    """

    directions: Tensor
    transitions: Tensor
    first: int
    count: int
    multiplier: float
    threshold: float
    affirmation: tuple[int, ...]
    batch_size: int = 8

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        processing_class: ProcessingClass,
        *,
        harmful: PromptSource,
        harmless: PromptSource,
        layers: tuple[float, float] = (10 / 32, 19 / 32),
        multiplier: float = 3.5,
        threshold: float | None = None,
        batch_size: int = 8,
        progress: bool = False,
    ) -> "Scans":
        """Find directions, transitions and threshold from anchors.

        Args:
            model: The model to be steered; it is left as it was.
            processing_class: Its tokenizer or processor, with a chat template.
            harmful: Harmful anchors; the paper has 64 of AdvBench.
            harmless: Harmless anchors; the paper has 64 of TruthfulQA.
            layers: Depths of the first and last steered layer, as shares of all layers.
            multiplier: Length of the step along a unit vector.
            threshold: Score from which a query is harmful; the paper has 0.75, and other values on other data. None
                for the score at which both kinds of error are equally frequent on every fourth anchor, which is then in
                no vector.
            batch_size: Prompts per forward pass.
            progress: Whether to show progress bars.

        Returns:
            What steers the model.

        Raises:
            ConfigurationError: A setting is out of range.
            DataError: There are too few anchors.
            ArchitectureError: The decoder layers are not found.
        """
        if not (0 <= layers[0] <= layers[1] < 1):
            raise ConfigurationError(f"layers={layers!r}: expected two shares with 0 <= first <= last < 1")
        tokenizer: Any = tokenizer_of(processing_class)
        affirmation = tuple(tokenizer(AFFIRMATION, add_special_tokens=False)["input_ids"])
        kinds = {"harmful": read_prompts(harmful, "harmful"), "harmless": read_prompts(harmless, "harmless")}
        least = 2 if threshold is not None else HELD_OUT
        if few := [name for name, prompts in kinds.items() if len(prompts) < least]:
            raise DataError(f"{few[0]}: {len(kinds[few[0]])} anchors are too few; give at least {least}")
        states = {
            name: last_states(
                model,
                [(*prompt_tokens(processing_class, prompt.messages), *affirmation) for prompt in prompts],
                positions=(-1 - len(affirmation), -1),
                batch_size=batch_size,
                progress=progress,
                desc=f"Anchors, {name}",
            )
            for name, prompts in kinds.items()
        }
        return _fitted(states["harmful"], states["harmless"], layers, multiplier, threshold, affirmation, batch_size)

    @property
    def steered(self) -> range:
        """Numbers of the steered layers."""
        return range(self.first, self.first + len(self.directions))

    def scores(self, model: PreTrainedModel, processing_class: ProcessingClass, prompts: PromptSource) -> list[float]:
        """How harmful queries look: mean cosine of their transitions with those of harmful anchors.

        Args:
            model: The model.
            processing_class: Its tokenizer or processor.
            prompts: Queries.

        Returns:
            Scores from -1 to 1; those from `threshold` on are harmful.
        """
        read: list[Prompt] = read_prompts(prompts)
        self._require_model(model)
        return self._scores(model, [prompt_tokens(processing_class, prompt.messages) for prompt in read])

    def _scores(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[float]:
        states = last_states(
            model,
            [(*prompt, *self.affirmation) for prompt in prompts],
            positions=(-1 - len(self.affirmation), -1),
            batch_size=self.batch_size,
        )
        return _agreement(states[:, :, self.first :], self.transitions).tolist()

    @contextmanager
    def steer(self, model: PreTrainedModel) -> Iterator[None]:
        """Steer a model in the block: away from refusal for queries that look harmless, towards it for harmful ones.

        Each query is told once, when the model reads it; the last prompt token and all that are generated are moved.
        Batches are padded on the left, with an `attention_mask`.

        Args:
            model: The model, with or without adapters.

        Yields:
            Nothing.

        Raises:
            ConfigurationError: The model has other layers; in the block: the input is no text padded on the left.
            ArchitectureError: Its decoder layers are not found.
        """
        self._require_model(model)
        if not self.multiplier:
            yield
            return
        steering = _Steering(self, model)
        layers = decoder_layers(model)
        with ExitStack() as hooks:
            for around in _around(model, layers[0][0]):
                hooks.callback(around.register_forward_pre_hook(steering.begin, with_kwargs=True).remove)
                hooks.callback(around.register_forward_hook(steering.end, always_call=True).remove)
            for number, direction in zip(self.steered, self.directions, strict=True):
                name, layer = layers[number]
                hooks.callback(layer.register_forward_hook(steering.mover(name, direction)).remove)
            yield

    def _require_model(self, model: nn.Module) -> None:
        layers = decoder_layers(model)
        config: Any = getattr(model, "config", None)
        hidden = getattr(config.get_text_config(decoder=True), "hidden_size", None) if config is not None else None
        if len(layers) != self.count or hidden not in (None, self.directions.shape[1]):
            raise ConfigurationError(
                f"scans: fitted on a model of {self.count} layers with {self.directions.shape[1]} hidden units; this "
                f"one has {len(layers)} with {hidden}; fit on this one"
            )

    def save(self, path: str | Path) -> None:
        """Write it as a safetensors file, whole or not at all.

        Args:
            path: File to write; one that is there is replaced.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        with complete_file(Path(path)) as part:
            tensors = {"directions": self.directions.contiguous(), "transitions": self.transitions.contiguous()}
            save_file(tensors, part, metadata={"scans": json.dumps(settings)})

    @classmethod
    def load(cls, path: str | Path) -> "Scans":
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The same.

        Raises:
            DataError: The file is missing, or is something else.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                settings = json.loads(file.metadata()["scans"])
                tensors = {name: file.get_tensor(name) for name in ("directions", "transitions")}
            return cls(**tensors, **settings | {"affirmation": tuple(settings["affirmation"])})
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise DataError(f"{path} holds no saved scans ({error})") from error


_SETTINGS: Final = ("first", "count", "multiplier", "threshold", "affirmation", "batch_size")


def _fitted(
    harmful: Tensor,
    harmless: Tensor,
    layers: tuple[float, float],
    multiplier: float,
    threshold: float | None,
    affirmation: tuple[int, ...],
    batch_size: int,
) -> Scans:
    # [anchors, (end of the prompt, affirmation), layers, hidden]
    count = harmful.shape[2]
    steered = layer_range(*layers, count)
    aside = slice(HELD_OUT - 1, None, HELD_OUT)
    used = [states if threshold is not None else _without(states) for states in (harmful, harmless)]
    difference = used[0][:, 0].mean(0) - used[1][:, 0].mean(0)
    moves = used[0][:, 1] - used[0][:, 0]
    transitions = moves.mean(0)[steered.start :]
    if threshold is None:
        held_out = [_agreement(states[aside][:, :, steered.start :], transitions) for states in (harmful, harmless)]
        threshold = equal_error_threshold(held_out[0].tolist(), held_out[1].tolist())
    return Scans(
        directions=nn.functional.normalize(difference[steered.start : steered.stop], dim=-1),
        transitions=transitions,
        first=steered.start,
        count=count,
        multiplier=multiplier,
        threshold=threshold,
        affirmation=affirmation,
        batch_size=batch_size,
    )


def _without(states: Tensor) -> Tensor:
    keeps = [place for place in range(len(states)) if place % HELD_OUT != HELD_OUT - 1]
    return states[keeps]


def _agreement(states: Tensor, transitions: Tensor) -> Tensor:
    """Mean cosine over layers.

    Args:
        states: [queries, 2, layers, hidden].
        transitions: [layers, hidden].

    Returns:
        [queries].
    """
    moves = states[:, 1] - states[:, 0]
    return nn.functional.cosine_similarity(moves, transitions.to(moves), dim=-1).mean(-1)


def equal_error_threshold(harmful: Sequence[float], harmless: Sequence[float]) -> float:
    """The score at which both kinds of error are equally frequent.

    Args:
        harmful: Scores of harmful queries.
        harmless: Scores of harmless ones.

    Returns:
        The middle between the two neighbouring scores between which the shares of harmful queries below and of harmless
        ones above differ least, and are least.
    """
    ordered = sorted({*harmful, *harmless})
    candidates = [(low + high) / 2 for low, high in zip(ordered, ordered[1:], strict=False)] or ordered

    def errors(limit: float) -> tuple[float, float]:
        missed = sum(score < limit for score in harmful) / len(harmful)
        alarmed = sum(score >= limit for score in harmless) / len(harmless)
        return abs(missed - alarmed), missed + alarmed

    return min(candidates, key=errors)


def _around(model: nn.Module, layer: str) -> list[nn.Module]:
    # All that hold the list of layers: which of them is called depends on the architecture, and on PEFT, which calls
    # `forward` of the model that it wraps, past its hooks.
    modules = dict(base_modules(model))
    parts = layer.split(".")[:-2]
    return [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]


class _Steering:
    """What is known of the batch that a model is generating from."""

    def __init__(self, scans: Scans, model: nn.Module) -> None:
        self._scans, self._model = scans, model
        self._is_reading = False
        self._outermost: nn.Module | None = None
        """The module whose call is going on."""
        self._prompt: Tensor | None = None
        """The prompts, [batch, tokens]."""
        self._seen = 0
        """How many tokens the last input had."""
        self._cache: Any = None
        """The cache that it came with."""
        self._step = torch.zeros(0)
        """Signed length of the step of each row, [batch, 1, 1]."""
        self._start = 0
        """From which token of the present input on states are moved."""

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_reading or self._outermost is not None:
            return
        input_ids = _text_of(kwargs.get("input_ids", args[0] if args else None), kwargs)
        cache = next((kwargs[key] for key in _CACHES if kwargs.get(key) is not None), None)
        mask = kwargs.get("attention_mask")
        if self._goes_on(input_ids, cache, mask):
            self._start = 0
        elif self._is_read_again(input_ids, cache):
            assert self._prompt is not None, "it is the prompt that is read again"
            self._start = self._prompt.shape[1] - 1
        else:
            self._tell(input_ids, mask)
            self._start = input_ids.shape[1] - 1
        self._cache, self._seen, self._outermost = cache, input_ids.shape[1], module

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401 - a hook
        if module is self._outermost:
            self._outermost = None

    def _goes_on(self, input_ids: Tensor, cache: Any, mask: Tensor | None) -> bool:  # noqa: ANN401
        # A cache that keeps no tokens, as of recurrent layers, is known by itself, or by a mask of all that was read.
        known = cache is not None and cache is self._cache
        longer = mask is not None and mask.dim() == 2 and mask.shape[1] > input_ids.shape[1]
        if not known and not longer and not _length(cache):
            return False
        if self._prompt is None or len(input_ids) != len(self._step):
            raise ConfigurationError(
                "scans: the model goes on from a cache of a prompt that was not read in this block; read the prompt "
                "inside of `with scans.steer(model)`"
            )
        return True

    def _is_read_again(self, input_ids: Tensor, cache: Any) -> bool:  # noqa: ANN401
        # Without a cache each step reads the prompt and all that was generated, one token more than before.
        prompt = self._prompt
        if prompt is None or cache is not None or input_ids.shape[1] != self._seen + 1:
            return False
        return torch.equal(input_ids[:, : prompt.shape[1]], prompt)

    def _tell(self, input_ids: Tensor, mask: Tensor | None) -> None:
        if mask is not None and (mask.dim() != 2 or not mask[:, -1].all()):
            raise ConfigurationError("scans: padding stands on the right; set tokenizer.padding_side = 'left'")
        read = torch.ones_like(input_ids) if mask is None else mask[:, -input_ids.shape[1] :]
        prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, read, strict=True)]
        self._is_reading = True
        try:
            scores = self._scans._scores(self._model, prompts)
        finally:
            self._is_reading = False
        signs = [1.0 if score >= self._scans.threshold else -1.0 for score in scores]
        self._step = self._scans.multiplier * torch.tensor(signs).view(-1, 1, 1)
        self._prompt = input_ids

    def mover(self, name: str, direction: Tensor) -> Any:  # noqa: ANN401 - a hook
        def move(module: nn.Module, inputs: Any, output: Any) -> Any:  # noqa: ANN401
            if self._is_reading:
                return None
            states = hidden_of(output, name).clone()
            states[:, self._start :] += self._step.to(states) * direction.to(states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return move


def _text_of(input_ids: Any, kwargs: Mapping[str, Any]) -> Tensor:  # noqa: ANN401
    given = [name for name, value in kwargs.items() if value is not None]
    if other := [name for name in given if name.startswith(_NO_TEXT)] or not isinstance(input_ids, Tensor):
        shown = other if isinstance(other, list) else ["no input_ids"]
        raise ConfigurationError(f"scans: the model is given {', '.join(shown)}; only text prompts can be told apart")
    return input_ids


_NO_TEXT: Final = ("inputs_embeds", "pixel_values", "image", "audio", "input_features", "video")
_CACHES: Final = ("cache", "past_key_values", "cache_params")
"""What versions and architectures of transformers call what was read before."""


def _length(cache: Any) -> int:  # noqa: ANN401 - a cache of transformers
    length = getattr(cache, "get_seq_length", None)
    try:
        return int(length()) if callable(length) else 0
    except ValueError:  # recurrent layers alone, which keep no tokens
        return 0
