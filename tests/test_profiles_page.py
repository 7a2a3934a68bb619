"""What docs/profiles.md shows runs as it stands."""

import json
import re
import shlex
from pathlib import Path

from huggingface_hub import constants
from typer.testing import CliRunner

from safedelta_hf.cli.main import app
from safedelta_hf.testbed import ALIGNED_MODEL, safety_data
from tests.fixtures.fake_hub import connected

PAGE = Path(__file__).parent.parent / "docs" / "profiles.md"


def test_every_command_and_every_script_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base-model").symlink_to(ALIGNED_MODEL)
    (tmp_path / "refusals.jsonl").write_text("\n".join(map(json.dumps, safety_data(24))))
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "python"]
    names = {}
    with connected(monkeypatch) as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for kind, text in blocks:
            if kind == "python":
                exec(compile(text, str(PAGE), "exec"), names)
                continue
            for line in text.splitlines():
                result = CliRunner().invoke(app, shlex.split(line)[1:])
                assert result.exit_code == 0, result.output
        assert names["profile"].moments["model.norm.weight:norm"].tokens and hub.private["org/my-profile"]
    assert {"profile", "my-profile", "resumable"} <= {path.name for path in tmp_path.iterdir()}
    assert "27 moments" in capsys.readouterr().out
