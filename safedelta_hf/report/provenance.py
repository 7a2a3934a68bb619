"""What a folder of adjusted weights says of itself: `safedelta.json`, and a section of its README.

The file names the weights that it speaks of by SHA-256 of each of their files, which is also what the Hub shows.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from safedelta_hf.errors import CheckpointError, warn
from safedelta_hf.folders import write_whole
from safedelta_hf.report.report import Report

RECORD_FILE: Final = "safedelta.json"
CARD_FILE: Final = "README.md"
TAG: Final = "safedelta"

FORMAT: Final = 1
"""Version of the layout of the file."""

WEIGHT_FILES: Final = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
"""Files of a folder that hold weights which are loaded from it."""

_BEGIN: Final = "<!-- safedelta: begin -->"
_END: Final = "<!-- safedelta: end -->"
_PARTS: Final = frozenset(
    ("adjusted", "rule", "strength", "base", "safety_data", "summary", "versions", "weights", "card", "date")
)
_VERSIONS: Final = ("safedelta-hf", "torch", "transformers", "peft")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What stands in the record of a folder, and whether the weights beside it are those that it speaks of.

    Attributes:
        folder: The folder.
        content: The record.
        missing: Names of weight files that it speaks of and that are not there.
        other: Names of those that have another digest.
        added: Names of those that it does not speak of.
    """

    folder: Path
    content: dict[str, Any]
    missing: tuple[str, ...]
    other: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def is_of_weights(self) -> bool:
        """Whether the weights in the folder are the ones that the record speaks of, and no others."""
        return not (self.missing or self.other or self.added)

    @property
    def told(self) -> str:
        """The record in sentences, and what came of the comparison."""
        found = self.content
        rule, base, data = found["rule"], found["base"], found["safety_data"]
        strength = "" if found["strength"] is None else f" at strength {found['strength']:.3g}"
        done = "adjusted" if found["adjusted"] else "checked, and left as tuned,"
        versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        lines = [
            f"{self.folder}: {done} with rule {rule['name']}{strength}, {found['date']} ({versions}).",
            f"Base: {base['model'] or base['source']} ({base['architecture']}), digest {base['digest'][:16]}.",
            f"Safety data: {data['sequences']} examples, {data['tokens']} tokens, fingerprint "
            f"{data['fingerprint'][:16]}."
            if data["sequences"]
            else "Safety data: none were read.",
            found["summary"],
        ]
        return "\n".join([*lines, self.compared] if self.is_of_weights else lines)

    @property
    def compared(self) -> str:
        """What came of the comparison with the weights, in a sentence."""
        if self.is_of_weights:
            return f"Weights: {len(self.content['weights'])} file(s), the ones that this was written of."
        told = {"is not there": self.missing, "has other content": self.other, "was added": self.added}
        listed = "; ".join(f"{', '.join(names)} {what}" for what, names in told.items() if names)
        return f"NOT THE WEIGHTS that this was written of: {listed}."


def write_provenance(folder: Path, report: Report, weights: Mapping[str, Path] | None = None) -> None:
    """Let a folder say that the weights in it are adjusted, in `safedelta.json` and in its README.

    Args:
        folder: A folder with the weights as they were adjusted.
        report: What was done to them.
        weights: Files that hold what its weight files will, by the names of these; None if they have their names. All
            of them are read, for their digests.

    Raises:
        OutputError: It cannot be written.
    """
    files = {path.name: path for path in _weight_files(folder)} if weights is None else weights
    _say(folder, report, {name: _digest(path) for name, path in files.items()})


def renew_provenance(folder: Path, report: Report) -> None:
    """Let a folder say more of what was done, of the weights that its record speaks of already; none is read again.

    Args:
        folder: A folder with a record that was just written.
        report: What was done to its weights.

    Raises:
        OutputError: It cannot be written.
    """
    content = _read(folder)
    assert content is not None, "it was just written"
    _say(folder, report, content["weights"])


def remove_provenance(folder: Path) -> None:
    """Take back what an earlier save said, since the weights in a folder are not adjusted any more.

    Args:
        folder: The folder; nothing is done where it says nothing.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return
    path.unlink()
    card = folder / CARD_FILE
    if card.exists():
        write_whole(card, _card(card.read_text(encoding="utf-8"), ""))


def restore_card(folder: Path) -> None:
    """Put the section about the adjustment into the README of a folder whose record speaks of one.

    Args:
        folder: The folder; what else is in its README stays.
    """
    if (content := _read(folder)) is None:
        return
    card = folder / CARD_FILE
    write_whole(card, _card(card.read_text(encoding="utf-8") if card.exists() else "", content["card"]))


def read_provenance(folder: Path) -> Provenance | None:
    """Read what a folder says of its weights, and compare it with them.

    Args:
        folder: A folder of weights.

    Returns:
        What it says; None if it says nothing.

    Raises:
        CheckpointError: There is no such folder, or its record is malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; give the folder of a saved model or adapter")
    if (content := _read(folder)) is None:
        return None
    stated, found = content["weights"], {path.name: path for path in _weight_files(folder)}
    return Provenance(
        folder=folder,
        content=content,
        missing=tuple(sorted(stated.keys() - found.keys())),
        other=tuple(sorted(name for name in stated.keys() & found.keys() if _digest(found[name]) != stated[name])),
        added=tuple(sorted(found.keys() - stated.keys())),
    )


def _say(folder: Path, report: Report, digests: dict[str, str]) -> None:
    write_whole(folder / RECORD_FILE, json.dumps(_content(report, digests), indent=1))
    restore_card(folder)


def _content(report: Report, weights: dict[str, str]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "adjusted": report.outcome == "adjusted",
        "outcome": report.outcome,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rule": {"name": report.rule.name, "settings": dict(report.rule.settings)},
        "strength": report.strength,
        "base": {
            "architecture": report.architecture,
            "source": report.base,
            "model": report.base_model,
            "digest": report.base_digest,
            "unverified": report.unverified,
        },
        "safety_data": {"fingerprint": report.data, "sequences": report.sequences, "tokens": report.tokens},
        "refusals": _measured(report),
        "summary": report.summary(),
        "versions": dict(_versions()),
        "weights": weights,
        "card": report.model_card(),
    }


def _measured(report: Report) -> dict[str, float] | None:
    search = report.search
    if search is None:
        return None
    return {
        "held_out": search.examples,
        "lost_as_tuned": search.trials[0].lost,
        "lost": search.applied.lost,
        "probability_lost": search.applied.probability_lost,
        "probability_lost_bound": search.applied.probability_lost_bound,
        "allowed": search.allowed,
        "share": search.share,
        "bound": search.bound,
        "confidence": search.confidence,
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in _VERSIONS:
        try:
            yield name, version(name)
        except PackageNotFoundError:  # such as peft, which is not needed
            continue


def _weight_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern) if path.is_file()})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or not _PARTS <= content.keys():
            raise ValueError(f"format {content['format']!r}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is no record of an adjustment ({error})") from error
    return dict(content)


def _card(text: str, section: str) -> str:
    # What somebody wrote stays; the section has marks, so that a new one replaces it.
    begin, end = text.find(_BEGIN), text.find(_END)
    if 0 <= begin < end:
        text = text[:begin].rstrip() + "\n" + text[end + len(_END) :].lstrip()
    if section:
        text = f"{text.rstrip()}\n\n{_BEGIN}\n{section.strip()}\n{_END}\n".lstrip()
    return _tagged(text, is_adjusted=bool(section))


def _tagged(text: str, *, is_adjusted: bool) -> str:
    from huggingface_hub.repocard import RepoCard

    if not text.startswith("---"):
        return f"---\ntags:\n- {TAG}\n---\n\n{text}" if is_adjusted else text
    try:
        card = RepoCard(text)
        given = card.data.get("tags") or []
        tags = [tag for tag in ([given] if isinstance(given, str) else given) if tag != TAG]
        card.data["tags"] = [*tags, TAG] if is_adjusted else tags or None
        return str(card)
    except Exception as error:  # of the YAML parser, and what else the text gives rise to
        warn(f"{CARD_FILE}: its metadata cannot be read, so the tag {TAG!r} is not in it ({error})")
        return text
