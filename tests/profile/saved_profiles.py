"""A small profile in every storage, and folders made of it."""

import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from safedelta_hf import ProfileConfig, collect_profile
from safedelta_hf.core.low_rank import dense
from tests.fixtures import tiny

STORAGES = ("float32", "triangular", "bfloat16", "eigenbasis:3")


def tiny_profile():
    """Of a model with biases, so that there are moments of both kinds."""
    return collect_profile(tiny.gpt2(), tiny.rows(16, seed=1), config=ProfileConfig(holdout=0.25), progress=False)


def same_moments(one, other):
    """Whether two profiles hold bit for bit the same."""
    assert (one.header, one.uses, one.held_out, list(one.moments)) == (
        other.header,
        other.uses,
        other.held_out,
        list(other.moments),
    )
    return all(
        torch.equal(dense(moment.total), dense(other.moments[key].total))
        and (moment.sequences, moment.tokens) == (other.moments[key].sequences, other.moments[key].tokens)
        for key, moment in one.moments.items()
    )


def contents(folder):
    """Bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def resign(folder, change=lambda content: None):
    """Change the header, and give it and all files the digests and sizes that fit."""
    path = folder / "profile.json"
    content = json.loads(path.read_text())
    for name, file in content["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            file.update(bytes=len(data), digest=hashlib.sha256(data).hexdigest())
    del content["digest"]
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"digest": digest, **content}))


def rewrite(folder, change):
    """Change the tensors of the first file with a full matrix, and sign everything again."""
    moments = json.loads((folder / "profile.json").read_text())["moments"]
    path = folder / next(moment["file"] for moment in moments if len(moment["shape"]) == 2)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    resign(folder)
