"""Tiny models that accelerate keeps in host memory or on disk, in all the ways that it knows."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import LlamaForCausalLM

from tests import tiny

REST = {"model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def _mixed(source: Path, place: Path) -> nn.Module:
    some = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers.1": "disk"}
    return tiny.loaded(source, device_map=some | REST, offload_folder=place)


def _some_layers(source: Path, place: Path) -> nn.Module:
    some = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.layers.1": "disk"}
    return tiny.loaded(source, device_map=some | REST, offload_folder=place)


def _dispatched(source: Path, place: Path) -> nn.Module:
    some = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers.1": "disk"}
    return dispatch_model(tiny.loaded(source), some | REST, offload_dir=place)


def _with_hook(source: Path, place: Path) -> nn.Module:
    return cpu_offload_with_hook(tiny.loaded(source), "cpu")[0]


def _chained(source: Path, place: Path) -> nn.Module:
    model = disk_offload(tiny.loaded(source), place)
    for module in (model.model.layers[0].mlp.up_proj, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(io_same_device=True), append=True)
    return model


KINDS: dict[str, Callable[[Path, Path], nn.Module]] = {
    "disk": lambda source, place: tiny.loaded(source, device_map={"": "disk"}, offload_folder=place),
    "disk, no folder": lambda source, place: tiny.loaded(source, device_map={"": "disk"}),
    "some on disk": _mixed,
    "one layer on disk": _some_layers,
    "dispatched": _dispatched,
    "disk_offload": lambda source, place: disk_offload(tiny.loaded(source), place),
    "disk_offload of whole blocks": lambda source, place: disk_offload(
        tiny.loaded(source), place, preload_module_classes=["LlamaDecoderLayer"]
    ),
    "cpu_offload": lambda source, place: cpu_offload(tiny.loaded(source)),
    "cpu_offload of whole blocks": lambda source, place: cpu_offload(
        tiny.loaded(source), preload_module_classes=["LlamaDecoderLayer"]
    ),
    "cpu_offload_with_hook": _with_hook,
    "chained hooks": _chained,
}

SAVABLE = ("disk", "disk, no folder", "some on disk", "one layer on disk", "dispatched", "cpu_offload_with_hook")
"""Those that `save_pretrained` of transformers can save; the others have no device map."""

IDS = torch.tensor([[1, 5, 9, 7, 3]])


def offloaded(kind: str, folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of that kind, of weights saved in `folder / "model"`."""
    source = saved(folder / "model", tied=tied, dtype=dtype)
    place = folder / "offloaded"
    place.mkdir()
    return KINDS[kind](source, place)


def saved(folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    tiny.perturbed(tiny.llama(tied=tied)).to(dtype).save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def in_memory(folder: Path) -> LlamaForCausalLM:
    return tiny.loaded(folder / "model")
