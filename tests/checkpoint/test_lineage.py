"""What a folder says of where it came from."""

import json
import warnings

import pytest

from safedelta_hf.checkpoint.lineage import require_order
from safedelta_hf.errors import ConfigurationError, SafeDeltaWarning


@pytest.fixture
def folders(tmp_path):
    cached = tmp_path / "hub" / "models--org--base" / "snapshots" / "0123"
    for folder in (cached, tmp_path / "tuned"):
        folder.mkdir(parents=True)
    return cached, tmp_path / "tuned"


def says(folder, base):
    yield "README.md", f"---\nbase_model: {base}\n---\n\n# Mine\n"
    yield "README.md", f"---\nbase_model:\n- org/other\n- {base}\n---\n"
    yield "config.json", json.dumps({"_name_or_path": str(base)})
    yield "safedelta.json", json.dumps({"base": {"source": str(base)}})


def test_a_base_that_names_the_fine_tuned_model_was_exchanged_with_it(folders):
    base, tuned = folders
    for name in ("org/base", str(base)):
        for file, text in says(tuned, name):
            (tuned / file).write_text(text)
            require_order(base, tuned)
            with pytest.raises(ConfigurationError, match=f"{file}' says .*{name}.*exchanged.*--base"):
                require_order(tuned, base)
            (tuned / file).unlink()


def test_one_folder_for_both_is_told(folders, monkeypatch):
    base, tuned = folders
    monkeypatch.chdir(tuned)
    for one, other in ((base, base), (".", tuned), (tuned / "." / "..", tuned.parent)):
        with pytest.warns(SafeDeltaWarning, match="base and tuned are both .* nothing to adjust"):
            require_order(one, other)


@pytest.mark.parametrize("text", ["", "{", "[]", "---\nbase_model: [\n---\n", "---\nbase_model: 7\n---\n", "\udcff"])
def test_what_cannot_be_read_says_nothing(folders, text):
    base, tuned = folders
    for file in ("README.md", "config.json", "safedelta.json"):
        (tuned / file).write_bytes(text.encode(errors="surrogateescape"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_order(tuned, base)
        require_order("org/base", tuned)
