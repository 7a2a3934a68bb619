"""Tiny models in files: a base, a fine-tune of it, and a profile, saved the way people save them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safedelta_hf import Report, Ridge, SafetyProfile, adjust_checkpoint
from tests import adapters, architectures, tiny

RULE = Ridge(strength=1.0)

MODELS = {
    "one layer": lambda: tiny.llama(num_hidden_layers=1),
    "untied": tiny.llama,
    "tied": lambda: tiny.llama(tied=True),
    "bfloat16": lambda: tiny.llama().bfloat16(),
    "gpt2": tiny.gpt2,
    "mixtral": lambda: architectures.tiny_model("mixtral"),
}


@dataclass(frozen=True)
class Case:
    """Where the inputs stand, and the fine-tuned model itself."""

    folder: Path
    model: torch.nn.Module
    profile: SafetyProfile

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def tuned(self) -> Path:
        return self.folder / "tuned"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    @property
    def work(self) -> Path:
        return self.folder / ".output.unfinished"

    @property
    def paths(self) -> dict[str, Path]:
        return {name: self.folder / name for name in ("base", "tuned", "output", "profile")}

    def adjust(self, **settings) -> Report:
        return adjust_checkpoint(**{**self.paths, "rule": RULE, "progress": False} | settings)


def save(model, folder: Path, shards: str = "50GB") -> None:
    model.save_pretrained(folder, max_shard_size=shards, save_original_format=False)


def case(folder: Path, kind: str = "untied", *, base_shards: str = "50GB", shards: str = "4KB") -> Case:
    base = MODELS[kind]()
    profile = adapters.profile_of(base)
    profile.save(folder / "profile")
    save(base, folder / "base", base_shards)
    model = tiny.perturbed(MODELS[kind]())
    save(model, folder / "tuned", shards)
    tiny.tokenizer().save_pretrained(folder / "tuned")
    return Case(folder, model, profile)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rename(folder: Path, names: dict[str, tuple[str, ...]]) -> None:
    """Store the tensors of a checkpoint in one file under other names, or under several."""
    stored = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    renamed = {new: stored[name].clone() for name in stored for new in names.get(name, (name,))}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def reshard(folder: Path, count: int) -> None:
    """Deal the tensors of a checkpoint out to some shards, in reverse order of their names."""
    stored = tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    weight_map = {}
    for number in range(count):
        file = f"part-{number}.safetensors"
        dealt = sorted(stored, reverse=True)[number::count]
        save_file({name: stored[name] for name in dealt}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(dealt, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def metadata(path: Path) -> dict[str, str] | None:
    with safe_open(path, framework="pt") as file:
        return file.metadata()
