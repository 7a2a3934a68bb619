import json

from typer.testing import CliRunner

from safedelta_hf.cli.main import app
from safedelta_hf.report.provenance import RECORD_FILE, write_provenance
from tests.report.test_provenance import folder, report  # noqa: F401 - fixtures


def show(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def test_a_record_is_shown_and_compared_with_the_weights(report, folder):  # noqa: F811
    write_provenance(folder, report)
    shown = show(folder)
    assert shown.exit_code == 0 and "adjusted with rule safe_delta at strength 0.1" in shown.output
    assert "Refusals: not measured" in shown.output and "1 file(s), the ones" in shown.output
    assert json.loads(show(folder, "--json").output)["weights"].keys() == {"model.safetensors"}
    (folder / "model.safetensors").write_bytes(b"other")
    shown = show(folder)
    assert shown.exit_code == 1 and "NOT THE WEIGHTS" in shown.output and "model.safetensors has" in shown.output


def test_a_folder_without_a_record_and_a_broken_one_are_said_plainly(folder, tmp_path):  # noqa: F811
    shown = show(folder)
    assert shown.exit_code == 1 and "not adjusted" in shown.output
    (folder / RECORD_FILE).write_text("{")
    assert show(folder).exit_code == 1 and "is no record of an adjustment" in show(folder).output
    assert show(tmp_path / "none").exit_code == 1 and "is no folder" in show(tmp_path / "none").output
