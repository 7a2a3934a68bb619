"""Models that say what they are when they are saved."""

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from safedelta_hf.modules.quantised import is_quantised
from safedelta_hf.report.provenance import TAG, remove_provenance, write_provenance
from safedelta_hf.report.report import Report

SAMPLED: Final = 32
"""Entries of each parameter that is not packed, by which a model is told from itself after further training."""

_SAVES, _UPLOADS = "save_pretrained", "_upload_modified_files"


@dataclass(frozen=True)
class _Followed:
    """What a model is when it is followed.

    Attributes:
        report: What was done to it; None if it is not adjusted.
        adapter: The adapter that was adjusted; None for a whole model.
        sample: Some entries of each parameter that can be trained.
    """

    report: Report | None
    adapter: str | None
    sample: dict[str, Tensor]


def follow_saving(model: nn.Module, report: Report | None, *, adapter: str | None = None, writes: bool = True) -> None:
    """Let whatever the `save_pretrained` of a model writes say whether it is adjusted.

    Beside adjusted weights `safedelta.json` and a section of the README are written; beside others, those of an earlier
    save are removed. A model that is trained on after this is taken for what it is: not adjusted.

    Args:
        model: A model with a `save_pretrained`; nothing is done to others. The method is replaced on this object alone,
            and a copy of it follows on its own.
        report: What was done to it; None if it is not adjusted.
        adapter: Name of the adapter that was adjusted; None for a whole model.
        writes: Whether this process does the writing.
    """
    if not hasattr(type(model), _SAVES):
        return
    followed = _Followed(report, adapter, {} if report is None else _sample(model))
    _put(model, _SAVES, followed, first=True, writes=writes)
    # A push writes the card of the repository over what was saved.
    _put(model, _UPLOADS, followed, first=False, writes=writes)
    _tag(model, is_adjusted=report is not None)


def is_adjusted(model: nn.Module) -> bool:
    """Whether a model holds the weights that an adjustment gave it.

    Args:
        model: A model.

    Returns:
        Whether it was adjusted, and not trained since.
    """
    method = vars(model).get(_SAVES)
    followed = getattr(method, "safedelta", (None, None))[0]
    return followed is not None and followed.report is not None and _is_same(model, followed)


def _put(model: nn.Module, name: str, followed: _Followed, *, first: bool, writes: bool) -> None:
    if not hasattr(type(model), name):
        return
    inner = _own(model, name)

    @functools.wraps(inner)
    def method(self: nn.Module, folder: str | Path, *args: Any, **settings: Any) -> Any:  # noqa: ANN401
        result = inner(self, folder, *args, **settings) if first else None
        if writes:
            _describe(self, followed, Path(folder))
        return result if first else inner(self, folder, *args, **settings)

    method.safedelta = (followed, inner)  # type: ignore[attr-defined]
    setattr(model, name, MethodType(method, model))


def _own(model: nn.Module, name: str) -> Callable[..., Any]:
    # What was put on the object by others is called as well, and what was put there before by us is not.
    method = vars(model).get(name)
    if method is None:
        return getattr(type(model), name)  # type: ignore[no-any-return]
    if hasattr(method, "safedelta"):
        return method.safedelta[1]  # type: ignore[no-any-return]
    function = getattr(method, "__func__", None)
    return function if function is not None else lambda _, *args, **settings: method(*args, **settings)


def _describe(model: nn.Module, followed: _Followed, folder: Path) -> None:
    own = folder / (followed.adapter or "")
    place = own if followed.adapter is not None and own.is_dir() else folder
    if followed.report is not None and _is_same(model, followed):
        write_provenance(place, followed.report)
    else:
        remove_provenance(place)


def _is_same(model: nn.Module, followed: _Followed) -> bool:
    now = _sample(model)
    then = followed.sample
    return now.keys() == then.keys() and all(torch.equal(now[name], then[name]) for name in now)


@torch.no_grad()
def _sample(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if is_quantised(parameter):
            # No training changes a packed weight. Its entries cannot be picked out (torchao has no such operation), and
            # its codes may be put in another order by a forward pass (bitsandbytes on a CPU).
            continue
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
        if local.numel() and not local.is_meta:
            flat = local.reshape(-1)
            found[name] = flat[:: max(1, flat.numel() // SAMPLED)].cpu().clone()
    return found


def _tag(model: nn.Module, *, is_adjusted: bool) -> None:
    tags = getattr(model, "model_tags", None)
    if is_adjusted and TAG not in (tags or []) and hasattr(model, "add_model_tags"):
        model.add_model_tags([TAG])  # type: ignore[operator]
    elif not is_adjusted and isinstance(tags, list):
        with suppress(ValueError):
            tags.remove(TAG)
