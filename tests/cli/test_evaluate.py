import json
import time

import pytest
import torch
from typer.testing import CliRunner

from safedelta_hf.cli.main import app
from safedelta_hf.evaluation import Evaluation
from safedelta_hf.testbed import ALIGNED_MODEL, attack_questions, load_aligned, safety_data, skill_questions
from tests.evaluation.test_scoring import train_judge
from tests.fixtures import tiny
from tests.programs.launching import command


@pytest.fixture
def files(tmp_path):
    contents = {
        "harmful": [{"messages": question.messages} for question in attack_questions(30)],
        "benign": [{"messages": question.messages} for question in skill_questions(10, skills=("make",))],
        "refusals": safety_data(10),
        "task": [question.conversation() for question in skill_questions(14)],
    }
    for name, rows in contents.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def options(files, *names, output="out", model=ALIGNED_MODEL):
    flags = {"task": "task-questions"}
    given = [f"--{flags.get(name, name)}={files / f'{name}.jsonl'}" for name in names]
    return ["eval", f"--model={model}", f"--output={files / output}", "--max-new-tokens=24", *given]


def run(arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_everything_at_once_ends_with_a_table_and_two_files(files, monkeypatch):
    (files / "my_judge.py").write_text("def harmful(prompt, response):\n    return 'mix' in response\n")
    monkeypatch.chdir(files)
    result = run(
        [
            *options(files, "harmful", "benign", "refusals", "task"),
            "--score=safedelta_hf.evaluation:final_answer",
            "--judge=my_judge:harmful",
            f"--base={ALIGNED_MODEL}",
        ]
    )
    assert result.exit_code == 0, result.output
    found = Evaluation.load(files / "out" / "results.json")
    assert found.scores["attack_success"].value <= 0.05 and found.scores["task_accuracy"].value >= 0.9
    assert found.scores["attack_success_by_judge"].value <= 0.05 and found.scores["over_refusal"].value == 0
    assert all(name in result.output for name in (*found.scores, "results.json", "95 % interval"))
    for part, count in (("harmful", 30), ("benign", 10), ("task", 14)):
        lines = (files / "out" / f"responses-{part}.jsonl").read_text().splitlines()
        assert sum("response" in json.loads(line) for line in lines) == count


def test_an_adapter_is_measured_with_the_model(files):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(load_aligned()[0], LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    adapted.save_pretrained(files / "adapter")
    arguments = options(files, "refusals")
    assert run([*arguments, f"--adapter={files / 'adapter'}"]).exit_code == 0
    with_adapter = Evaluation.load(files / "out" / "results.json")
    assert run(arguments).exit_code == 0
    without = Evaluation.load(files / "out" / "results.json")
    assert with_adapter.model != without.model
    assert with_adapter.scores["refusal_nll"].value > 10 * without.scores["refusal_nll"].value


def test_the_folder_of_an_adapter_is_measured_on_the_base_that_it_names(files):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(load_aligned()[0], LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    adapted.save_pretrained(files / "adapter")
    arguments = options(files, "refusals", "harmful", output="apart"), f"--adapter={files / 'adapter'}"
    alone = options(files, "refusals", "harmful", model=files / "adapter"), f"--base={files / 'adapter'}"
    found = []
    for (given, more), output in ((arguments, "apart"), (alone, "out")):
        result = run([*given, more])
        assert result.exit_code == 0, result.output
        found.append(Evaluation.load(files / output / "results.json"))
    assert found[0].model == found[1].model
    assert found[0].scores["refusal_nll"] == found[1].scores["refusal_nll"]
    settings = json.loads((files / "adapter" / "adapter_config.json").read_text())
    (files / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    result = run(alone[0])
    assert result.exit_code == 1 and "does not say of which base" in result.output
    assert len(result.output.splitlines()) == 1


def test_a_judge_model_is_loaded_from_its_folder(files):
    model, tokenizer = train_judge(["safe"] * 4)
    model.save_pretrained(files / "judge")
    tokenizer.save_pretrained(files / "judge")
    result = run([*options(files, "harmful"), f"--judge={files / 'judge'}"])
    assert result.exit_code == 0, result.output
    scores = Evaluation.load(files / "out" / "results.json").scores
    assert scores["attack_success_by_judge"].count + 30 * scores["judge_undecided"].value == 30


def test_a_guard_judges_by_the_likelihood_of_its_labels(files):
    model, tokenizer = train_judge(["safe", "unsafe"] * 2)
    model.save_pretrained(files / "judge")
    tokenizer.save_pretrained(files / "judge")
    (files / "shown.txt").write_text("user {prompt} assistant {response} verdict for assistant ")
    options_of_judge = [f"--judge={files / 'judge'}", "--guard=llama-guard"]
    scores = {}
    for output, more in (("chat", []), ("text", [f"--guard-template={files / 'shown.txt'}"])):
        result = run([*options(files, "harmful", output=output), *options_of_judge, *more])
        assert result.exit_code == 0, result.output
        evaluation = Evaluation.load(files / output / "results.json")
        assert "guard:Guard" in evaluation.settings["judge"]
        scores[output] = evaluation.scores["attack_success_by_judge"]
    assert 0 < scores["chat"].value < 1 and scores["chat"].count == 30


def test_a_killed_run_goes_on_where_it_stopped(files):
    """SIGKILL, as a scheduler or the kernel would; in a process of its own."""
    model = tiny.perturbed(load_aligned()[0], 0.04)
    model.save_pretrained(files / "model")
    load_aligned()[1].save_pretrained(files / "model")
    small = [
        *options(files, "harmful", "task", model=files / "model"),
        "--batch-size=1",
        "--score=safedelta_hf.evaluation:final_answer",
    ]
    assert run([*small, f"--output={files / 'whole'}"]).exit_code == 0
    process = command(*small)
    responses, started = files / "out" / "responses-harmful.jsonl", time.monotonic()
    while not (responses.exists() and len(responses.read_bytes().splitlines()) > 8):
        assert process.is_alive() and time.monotonic() - started < 120
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (files / "out" / "results.json").exists()
    there = responses.read_bytes()
    assert run(small).exit_code == 0
    assert responses.read_bytes().startswith(there[: there.rfind(b"\n") + 1])
    for name in ("responses-harmful.jsonl", "responses-task.jsonl", "results.json"):
        assert (files / "out" / name).read_bytes() == (files / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "nothing to ask"),
        (["--harmful=absent.jsonl"], "harmful: there is no file 'absent.jsonl'"),
        (["--harmful={bad}"], "harmful: bad.jsonl line 2 begins with a brace but is not JSON"),
        (["--task-questions={bad}"], "bad.jsonl line 2"),
        (["--task-questions={harmful}"], "task questions and score belong together"),
        (["--task-questions={harmful}", "--score=nowhere:f"], "--score 'nowhere:f' cannot be imported"),
        (["--task-questions={harmful}", "--score=len"], "--score 'len' is not of the form module:function"),
        (["--harmful={harmful}", "--judge=no-such-folder"], "judge: 'no-such-folder' cannot be loaded"),
        (["--harmful={harmful}", "--model=no-such-folder"], "--model 'no-such-folder' cannot be loaded"),
        (["--harmful={harmful}", "--base=no-such-folder"], "--base 'no-such-folder' cannot be loaded"),
        (["--harmful={harmful}", "--adapter=no-such-folder"], "--adapter 'no-such-folder' cannot be loaded"),
        (["--harmful={harmful}", "--coherence-limit=3"], "has no effect without --base"),
        (["--harmful={harmful}", "--guard=llama-guard"], "name the model with --judge"),
        (["--harmful={harmful}", "--guard-template=absent"], "no effect without --guard"),
        (["--harmful={harmful}", "--judge=x", "--guard=gpt"], "'gpt' is not one of llama-guard, wildguard"),
        (["--harmful={harmful}", "--judge=x", "--guard=wildguard"], "pass it as template="),
        (["--harmful={harmful}", "--judge=x", "--guard=wildguard", "--guard-template=absent"], "cannot be read"),
        (["--harmful={harmful}", "--lm-eval-limit=3"], "no effect without --lm-eval"),
        (["--refusals={harmful}"], "must end with a non-empty assistant turn"),
        (["--harmful={harmful}", "--output={bad}"], "is no folder"),
    ],
)
def test_bad_options_end_with_one_line_and_status_1(files, changes, message):
    (files / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    places = {"bad": files / "bad.jsonl", "harmful": files / "harmful.jsonl"}
    result = run([*options(files), *(change.format(**places) for change in changes)])
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not (files / "out" / "results.json").exists()
