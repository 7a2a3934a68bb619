"""Profiles on the Hugging Face Hub, as ordinary model repositories."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from transformers.utils.hub import extract_commit_hash

from safedelta_hf.errors import ProfileError
from safedelta_hf.profile.header import HEADER_FILE, SHARD_PATTERN
from safedelta_hf.records.header import ProfileHeader

CARD_FILE: Final = "README.md"
TAGS: Final = ("safedelta", "safety-profile")
LIBRARY: Final = "safedelta_hf"


def download(
    name: str, *, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> tuple[Path, Callable[[str], Path]]:
    """Fetch the header now, and each file of moments when it is asked for, all of one commit.

    Args:
        name: The repository, `organisation/name`.
        revision: Branch, tag or commit; None for the default branch.
        token: Access token; True or None for the one that was stored by logging in.
        cache_dir: Where downloads are kept; None for the usual place.

    Returns:
        The path of the header file, and what gives the path of another file by its name.

    Raises:
        ProfileError: There is no such repository, or no profile in it, or it cannot be reached.
    """

    def fetch(file: str, of: str | None) -> Path:
        with _named(name):
            return Path(
                hf_hub_download(name, file, revision=of, token=token, cache_dir=cache_dir, library_name=LIBRARY)
            )

    header = fetch(HEADER_FILE, revision)
    commit = extract_commit_hash(str(header), None) or revision
    return header, lambda file: fetch(file, commit)


def upload(
    folder: Path,
    name: str,
    *,
    revision: str | None,
    token: str | bool | None,
    private: bool | None,
    message: str,
    create_pr: bool,
) -> str:
    """Replace the profile in a repository by that of a folder, in one commit; the repository is made if need be.

    Args:
        folder: What `save` wrote.
        name: The repository, `organisation/name`.
        revision: Branch; None for the default one.
        token: Access token; True or None for the one that was stored by logging in.
        private: Whether a new repository is private; None for the organisation's default.
        message: Message of the commit.
        create_pr: Whether to open a pull request instead of committing.

    Returns:
        Address of the commit.

    Raises:
        ProfileError: The Hub refuses.
    """
    api = HfApi(token=token, library_name=LIBRARY)
    with _named(name):
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        has_card = api.file_exists(repository, CARD_FILE, revision=revision)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            create_pr=create_pr,
            # A card that somebody wrote is theirs.
            ignore_patterns=[CARD_FILE] if has_card else None,
            delete_patterns=[SHARD_PATTERN],
        )
    return str(commit.commit_url)


@contextmanager
def _named(repository: str) -> Iterator[None]:
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise ProfileError(f"profile: {repository!r} cannot be reached, and is not in the cache ({error})") from error
    except EntryNotFoundError as error:
        raise ProfileError(
            f"profile: {repository!r} on the Hub holds no safety profile, or not all of one ({error})"
        ) from error
    except HFValidationError as error:
        raise ProfileError(f"profile: {repository!r} is no folder, and no name of a repository ({error})") from error
    except Exception as error:
        # What the HTTP library of the Hub's client raises, which is another in each of its versions.
        raise ProfileError(f"profile: {repository!r}: no folder, and not within reach on the Hub ({error})") from error


def write_card(folder: Path, header: ProfileHeader, *, storage: str, name: str, base_model: str | None) -> None:
    """Write the card of a profile.

    Args:
        folder: What `save` wrote.
        header: Header of the profile.
        storage: How its moments are stored.
        name: Name of its repository.
        base_model: Name of the base model, if it is on the Hub.
    """
    data = ModelCardData(base_model=base_model, library_name=LIBRARY, tags=list(TAGS))
    kept = header.retention
    ordinary = f"\n* {kept.sequences} ordinary sequences, weighed {kept.weight:g}" if kept is not None else ""
    text = f"""---
{data.to_yaml()}
---

# Safety profile of {base_model or header.architecture}

Second moments of the inputs of every layer while the base model read safety data: what a fine-tune of that base is
adjusted by, to keep its refusals, with [safedelta_hf](https://arxiv.org/abs/2505.12038).

```python
from safedelta_hf import SafetyProfile

profile = SafetyProfile.load("{name}")
```

* architecture: {header.architecture}, {len(header.base)} parameters
* safety data: {header.sequences} sequences, {header.tokens} tokens{ordinary}
* storage: {storage}
"""
    ModelCard(text).save(folder / CARD_FILE)
