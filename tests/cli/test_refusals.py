import json

from typer.testing import CliRunner

from safedelta_hf.cli.main import app
from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.testbed import ALIGNED_MODEL, attack_questions, load_aligned, skill_questions


def run(*arguments):
    return CliRunner().invoke(app, ["refusals", f"--model={ALIGNED_MODEL}", *map(str, arguments)])


def test_refusals_of_a_file_and_of_a_set_become_safety_data_with_the_share_told(tmp_path, monkeypatch):
    from safedelta_hf.data.prompt_sets import PROMPT_SETS

    questions = attack_questions(8)
    monkeypatch.setattr(
        type(PROMPT_SETS["advbench"]), "prompts", lambda self: [one.messages[-1]["content"] for one in questions[:4]]
    )
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"messages": one.messages}) for one in questions[2:]))
    output = tmp_path / "refusals.jsonl"
    result = run("--prompts=advbench", f"--prompts={tmp_path / 'own.jsonl'}", f"--output={output}")
    assert result.exit_code == 0, result.output
    assert len(read_safety_data(str(output), load_aligned()[1])) == 8
    assert "8 of 8 refused (100.0%" in result.output and "8 refusals are few" in result.output
    assert (tmp_path / "refusals.jsonl.answers.jsonl").exists()


def test_no_refusal_and_an_output_that_exists_are_one_line_errors(tmp_path):
    output = tmp_path / "refusals.jsonl"
    (tmp_path / "benign.jsonl").write_text("\n".join(json.dumps({"messages": q.messages}) for q in skill_questions(2)))
    result = run(f"--prompts={tmp_path / 'benign.jsonl'}", f"--output={output}")
    assert result.exit_code == 1 and "refused none of 2 prompts" in result.output and not output.exists()
    output.write_text("mine")
    result = run(f"--prompts={tmp_path / 'benign.jsonl'}", f"--output={output}")
    assert result.exit_code == 1 and "exists" in result.output and output.read_text() == "mine"


def test_a_set_that_is_misspelt_is_told_with_those_that_there_are(tmp_path):
    result = run("--prompts=advbensh", f"--output={tmp_path / 'out.jsonl'}")
    assert result.exit_code == 1 and "no file, and no set: advbench, harmbench" in result.output
