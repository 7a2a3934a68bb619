"""The layers of a language model in the order in which they run, whatever its architecture and its wrappers."""

from typing import Final

from torch import nn
from transformers import PreTrainedModel

from safedelta_hf.errors import ArchitectureError
from safedelta_hf.modules.names import base_modules, class_name, join, unwrapped

_LISTS: Final = ("layers", "layer", "h", "blocks", "block")
"""What the architectures of transformers call the list of their layers."""

_WRAPPED: Final = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where `torch.compile` and wrappers for gradient checkpointing keep the layer that they wrap."""


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers between embedding and head, each of which makes hidden states of hidden states.

    Of a multimodal model those of its language model, of an encoder with a decoder the decoder's. What PEFT, FSDP,
    data parallelism, `torch.compile` and gradient checkpointing wrap around them is taken off.

    Args:
        model: A causal language model.

    Returns:
        Canonical name and module of each layer, in the order in which they run.

    Raises:
        ArchitectureError: There is no list of layers, or several could be meant.
    """
    lists = _of_the_language(model, _outermost_lists(model))
    if len(lists) == 1:
        ((name, layers),) = lists.items()
        return [(join(name, key), _bare(layer)) for key, layer in layers._modules.items() if layer is not None]
    kind = class_name(model)
    if lists:
        raise ArchitectureError(
            f"{kind}: several lists of layers could be meant: {', '.join(lists)}; expected one, so pass a part of it"
        )
    raise ArchitectureError(
        f"{kind}: there is no list of decoder layers; expected a ModuleList under one of the names {', '.join(_LISTS)}"
    )


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    # Inside of a layer, experts and branches are in lists too.
    found: dict[str, nn.ModuleList] = {}
    for name, module in base_modules(model):
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and name.rpartition(".")[2] in _LISTS and not is_inside:
            found[name] = module
    return found


def _of_the_language(model: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    # Told by what the model calls its decoder, then by what that holds itself, then by whose configuration it is.
    whole = next((module for _, module in base_modules(model) if isinstance(module, PreTrainedModel)), None)
    if whole is None or len(lists) < 2:
        return lists
    decoder: nn.Module = whole.get_decoder()  # type: ignore[no-untyped-call]
    for chosen in (set(decoder.modules()), set(decoder.children()), _outside_of_towers(whole)):
        lists = {name: layers for name, layers in lists.items() if layers in chosen} or lists
    return lists


def _outside_of_towers(whole: PreTrainedModel) -> set[nn.Module]:
    own = (whole.config, whole.config.get_text_config(decoder=True))
    towers = [
        module
        for module in whole.modules()
        if isinstance(module, PreTrainedModel) and not any(module.config is config for config in own)
    ]
    return set(whole.modules()).difference(*(tower.modules() for tower in towers))


def _bare(layer: nn.Module) -> nn.Module:
    layer = unwrapped(layer)
    while (inside := next((layer._modules[key] for key in _WRAPPED if key in layer._modules), None)) is not None:
        layer = unwrapped(inside)
    return layer
