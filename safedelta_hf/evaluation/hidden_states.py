"""What the decoder layers of a model say at the last tokens of its prompts."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from safedelta_hf.data.batches import arguments_of, batches_of_equal_length, require_fit
from safedelta_hf.data.dataset import SafetySequence
from safedelta_hf.errors import ArchitectureError, ConfigurationError
from safedelta_hf.modules.decoder_layers import decoder_layers
from safedelta_hf.modules.evaluating import evaluating
from safedelta_hf.report.progress import progress_bar


def last_states(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    positions: Sequence[int] = (-1,),
    batch_size: int = 8,
    progress: bool = False,
    desc: str = "Hidden states",
) -> Tensor:
    """The outputs of all decoder layers at the last tokens of prompts, in one forward pass for each batch.

    Batches hold prompts of one length and no padding, so nothing that is read depends on what else is in the batch.

    Args:
        model: A causal language model, adapters included; it is left as it was.
        prompts: Token ids of each prompt.
        positions: Which tokens, counted from the end: -1 is the last.
        batch_size: Prompts per forward pass, at most.
        progress: Whether to show a progress bar.
        desc: What the progress bar says.

    Returns:
        Hidden states, [prompts, positions, layers, hidden], in float32 or finer, on the CPU.

    Raises:
        ArchitectureError: A layer gives no hidden states [batch, tokens, hidden], or does not run once in each pass.
        ConfigurationError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigurationError(f"batch_size: must be at least 1, got {batch_size}")
    require_fit(model, prompts, "prompts")
    layers = decoder_layers(model)
    sequences = [SafetySequence(input_ids=tuple(prompt), labels=tuple(prompt)) for prompt in prompts]
    batches = list(batches_of_equal_length(list(dict.fromkeys(sequences)), batch_size))
    found: dict[SafetySequence, Tensor] = {}
    with evaluating(model):
        for batch in progress_bar(batches, desc=desc, unit="batch", disable=not progress):
            states_bplh = _batch_states(model, layers, arguments_of(model, batch), list(positions))
            found.update(zip(batch, states_bplh, strict=True))
    return torch.stack([found[sequence] for sequence in sequences])


def _batch_states(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], arguments: Mapping[str, Any], positions: list[int]
) -> Tensor:
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in layers}
    with ExitStack() as hooks:
        for name, layer in layers:

            def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:  # noqa: ANN401
                states_bth = hidden_of(output, name)
                seen[name].append(
                    states_bth[:, positions].to(torch.promote_types(states_bth.dtype, torch.float32)).cpu()
                )

            hooks.callback(layer.register_forward_hook(look).remove)
        model(**arguments)
    for name, states in seen.items():
        if len(states) != 1:
            raise ArchitectureError(f"{name}: the layer ran {len(states)} times in one forward pass; expected once")
    return torch.stack([states for (states,) in seen.values()], dim=2)


def hidden_of(output: Any, name: str) -> Tensor:  # noqa: ANN401
    """The hidden states among what a decoder layer returns.

    Args:
        output: A tensor, or a tuple that begins with it.
        name: Name of the layer, for the error.

    Returns:
        Hidden states, [batch, tokens, hidden].

    Raises:
        ArchitectureError: There are none.
    """
    states = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(states, Tensor) or states.dim() != 3:
        shape = f"a tensor of shape {tuple(states.shape)}" if isinstance(states, Tensor) else type(states).__name__
        raise ArchitectureError(f"{name}: the layer returns {shape}; expected hidden states [batch, tokens, hidden]")
    return states


def layer_range(first: float, last: float, count: int) -> range:
    """Layers between two depths that are given as shares of all layers.

    Args:
        first: Depth of the first, from 0 to 1.
        last: Depth of the last, which is included; below 1.
        count: Number of layers.

    Returns:
        Their numbers, at least one.
    """
    start = int(first * count + 1e-9)
    return range(start, max(start, min(int(last * count + 1e-9), count - 1)) + 1)
