"""What a folder of a model says of where it came from, to find out that base and fine-tuned model were exchanged."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from safedelta_hf.errors import ConfigurationError, warn
from safedelta_hf.report.provenance import CARD_FILE, RECORD_FILE

TRACES: Final = ("training_args.bin", "trainer_state.json", "optimizer.pt")
"""Files that a Trainer leaves beside what it trained."""


def require_order(base: str | Path, tuned: str | Path) -> None:
    """Stop where the base says that it was made from the fine-tuned model; warn where it looks so, or is that model.

    Without a profile no digest tells the two apart, and what came of it would be the base with a part of its delta
    taken away twice.

    Args:
        base: Folder or repository of the base.
        tuned: Folder of the fine-tuned model.

    Raises:
        ConfigurationError: The base names the fine-tuned model as what it was made from.
    """
    folder, other = Path(base), Path(tuned)
    if not folder.is_dir():
        return
    if folder.resolve() == other.resolve():
        warn(
            f"base and tuned are both {str(base)!r}, so there is nothing to adjust; give the aligned model as base "
            "(--base), and what fine-tuning made of it as tuned (--tuned)"
        )
        return
    for file, name in _origins(folder):
        if name == _repository(other) or (Path(name).is_dir() and Path(name).resolve() == other.resolve()):
            raise ConfigurationError(
                f"base: {str(folder / file)!r} says that this model was made from {name!r}, which is "
                f"tuned={str(tuned)!r}: the two are exchanged; give the aligned model as base (--base), and what "
                "fine-tuning made of it as tuned (--tuned)"
            )
    left = [name for name in TRACES if (folder / name).is_file()]
    if left and not any((other / name).is_file() for name in TRACES):
        warn(
            f"base: {str(base)!r} holds {left[0]}, which a Trainer leaves beside what it trained, and "
            f"tuned={str(tuned)!r} does not; if the two are exchanged (--base, --tuned), what is written is of no use"
        )


def _repository(folder: Path) -> str | None:
    # Of a snapshot in the cache of the Hub.
    repository = folder.resolve().parent.parent
    is_cached = folder.resolve().parent.name == "snapshots" and repository.name.startswith("models--")
    return repository.name.removeprefix("models--").replace("--", "/") if is_cached else None


def _origins(folder: Path) -> Iterator[tuple[str, str]]:
    for file, key in (("config.json", ("_name_or_path",)), (RECORD_FILE, ("base", "source"))):
        found = _json(folder / file)
        for part in key:
            found = found.get(part) if isinstance(found, dict) else None
        if isinstance(found, str) and found:
            yield file, found
    for name in _card_bases(folder / CARD_FILE):
        yield CARD_FILE, name


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # what has to be readable is read, and complained of, elsewhere


def _card_bases(path: Path) -> list[str]:
    from huggingface_hub.repocard import RepoCard

    try:
        named = RepoCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("base_model")
    except Exception:  # of the YAML parser, and whatever else somebody's text gives rise to
        return []
    names = named if isinstance(named, list) else [named]
    return [name for name in names if isinstance(name, str) and name]
