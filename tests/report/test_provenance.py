import dataclasses
import json
import shutil

import pytest
from safetensors.torch import save_file
from torch import arange

from safedelta_hf.errors import CheckpointError, SafeDeltaWarning
from safedelta_hf.report.provenance import (
    CARD_FILE,
    RECORD_FILE,
    read_provenance,
    remove_provenance,
    restore_card,
    write_provenance,
)
from tests.report.test_report import report, search, sorting  # noqa: F401 - a fixture


@pytest.fixture
def folder(tmp_path):
    save_file({"a": arange(4.0)}, tmp_path / "model.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    return tmp_path


def test_the_record_holds_what_was_done_to_which_weights_and_no_prompt(report, folder):  # noqa: F811
    told = dataclasses.replace(
        report, search=search(), sorting=sorting(), base_model="org/aligned@0123", base_digest="d" * 64, data="f" * 64
    )
    write_provenance(folder, told)
    found = read_provenance(folder)
    content = found.content
    assert found.is_of_weights and list(content["weights"]) == ["model.safetensors"]
    assert content["strength"] == 3.2 and content["rule"]["name"] == "safe_delta"
    assert content["base"]["model"] == "org/aligned@0123" and content["base"]["digest"] == "d" * 64
    assert content["safety_data"] == {"fingerprint": "f" * 64, "sequences": 3, "tokens": 30}
    assert (content["refusals"]["lost"], content["refusals"]["lost_as_tuned"]) == (0, 9)
    assert {"safedelta-hf", "torch", "transformers"} <= content["versions"].keys() and content["date"][:2] == "20"
    assert "bomb" not in (folder / RECORD_FILE).read_text() + (folder / CARD_FILE).read_text()


def test_weights_that_are_others_are_named(report, folder):  # noqa: F811
    write_provenance(folder, report)
    save_file({"a": arange(4.0) + 1e-7}, folder / "model.safetensors")
    save_file({"b": arange(4.0)}, folder / "more.safetensors")
    found = read_provenance(folder)
    assert (found.other, found.added, found.missing) == (("model.safetensors",), ("more.safetensors",), ())
    assert "model.safetensors has other content; more.safetensors was added" in found.compared
    (folder / "model.safetensors").unlink()
    assert read_provenance(folder).missing == ("model.safetensors",)


def test_a_copy_of_the_folder_tells_the_same(report, folder, tmp_path_factory):  # noqa: F811
    write_provenance(folder, report)
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(folder, copy)
    assert read_provenance(copy).is_of_weights


CARD = "---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n\nWritten by hand.\n"


@pytest.mark.parametrize("card", ["", CARD, "# No metadata\n", "---\ntags: one\n---\nText\n"])
def test_what_somebody_wrote_into_the_readme_survives_the_section_and_its_removal(report, folder, card):  # noqa: F811
    if card:
        (folder / CARD_FILE).write_text(card)
    write_provenance(folder, report)
    write_provenance(folder, report)
    text = (folder / CARD_FILE).read_text()
    assert text.count("## Safety adjustment") == 1 and "- safedelta" in text
    own = [line for line in card.splitlines() if line.strip() and not line.startswith("tags")]
    assert all(line in text for line in own)
    remove_provenance(folder)
    left = (folder / CARD_FILE).read_text()
    assert "safedelta" not in left and "Safety adjustment" not in left and not (folder / RECORD_FILE).exists()
    assert all(line in left for line in own) and read_provenance(folder) is None


def test_a_card_that_was_written_over_gets_its_section_back(report, folder):  # noqa: F811
    write_provenance(folder, report)
    (folder / CARD_FILE).write_text(CARD)
    restore_card(folder)
    text = (folder / CARD_FILE).read_text()
    assert "## Safety adjustment" in text and "Written by hand." in text and "- mine\n- safedelta" in text


def test_metadata_that_cannot_be_read_is_left_as_it_is(report, folder):  # noqa: F811
    (folder / CARD_FILE).write_text("---\n[broken: {\n---\nText\n")
    with pytest.warns(SafeDeltaWarning, match="metadata cannot be read"):
        write_provenance(folder, report)
    assert "[broken: {" in (folder / CARD_FILE).read_text() and "Safety adj" in (folder / CARD_FILE).read_text()


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({"format": 99})])
def test_a_malformed_record_is_a_named_error(folder, content):
    (folder / RECORD_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"safedelta\.json' is no record of an adjustment"):
        read_provenance(folder)


def test_a_folder_that_is_not_there_is_a_named_error(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder"):
        read_provenance(tmp_path / "none")
