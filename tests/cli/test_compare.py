import json
import shutil
import time

import pytest
import torch
from typer.testing import CliRunner

from safedelta_hf.cli import compare
from safedelta_hf.cli.main import app
from safedelta_hf.errors import SafeDeltaWarning
from safedelta_hf.testbed import (
    ALIGNED_MODEL,
    attack_questions,
    load_aligned,
    ordinary_data,
    safety_data,
    skill_questions,
)
from tests.fixtures import adapters, tiny
from tests.programs.launching import command

SMALL = ["--case=harmful", "--seed=0", "--weights=full", "--questions=12", "--method=none", "--ordinary-weight=0.1"]
SMALL += ["--rule=ridge", "--rule=scale", "--strength=auto", "--strength=1e-5"]
LORA = [
    "--case=harmful",
    "--seed=0",
    "--weights=lora",
    "--questions=12",
    "--method=none",
    "--rule=ties",
    "--rule=ridge",
]


def run(folder, *options):
    return CliRunner().invoke(app, ["compare", f"--output={folder}", *map(str, options)])


def points(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in told(folder, "point")]


def told(folder, kind):
    """What the whole lines of one kind say; the last one may be cut short."""
    whole = (folder / "results.jsonl").read_text().split("\n")[:-1]
    return [line[kind] for line in map(json.loads, whole) if kind in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "out"
    result = run(folder, *SMALL)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_rules_and_baselines_are_measured_on_the_same_fine_tuning(whole):
    attack = {}
    for row in points(whole[0]):
        name = (row["method"], row["settings"].get("strength") == 1e-5, row["settings"].get("ordinary_weight", 0.0))
        attack.setdefault(name, []).append(row["scores"]["attack_success"]["value"])
    assert all(len(values) == 1 for values in attack.values()) and len(attack) == 8
    ((aligned,), (tuned,)) = attack["aligned", False, 0.0], attack["fine-tuned", False, 0.0]
    assert aligned <= 0.1 and tuned >= 0.8
    # Next to no strength changes nothing, and what is measured brings the refusals back, retention or not.
    assert attack["scale", True, 0.0] == attack["ridge", True, 0.0] == [tuned]
    assert attack["ridge", False, 0.0][0] <= 0.1 and attack["ridge", False, 0.1][0] <= 0.1


def test_a_lora_is_compared_in_the_same_folder_with_the_rules_that_take_one(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    result = run(tmp_path / "out", *LORA)
    assert result.exit_code == 0, result.output
    rows = points(tmp_path / "out")
    assert [row["weights"] for row in rows] == ["full"] * 8 + ["lora"] * 3
    aligned, tuned, ridge = (row["scores"]["attack_success"]["value"] for row in rows[-3:])
    assert [row["method"] for row in rows[-3:]] == ["aligned", "fine-tuned", "ridge"]
    assert aligned <= 0.1 and tuned >= 0.8 and ridge <= 0.1
    assert "`ties (a LoRA)` left out: it needs whole weights" in result.output
    for name in ("comparison-full.png", "comparison-lora.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") and name in result.output


def test_table_figure_and_json_are_written(whole):
    folder, output = whole
    assert (folder / "comparison-full.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "comparison.md").read_text() in output
    (manifest,), rows = told(folder, "manifest"), told(folder, "point")
    assert manifest["questions"] == 12 and len(told(folder, "command")) == 1
    found = [row for row in rows if row["search"] is not None]
    assert found and all(row["seconds"] > 0 and len(row["search"]["trials"]) > 1 for row in found)
    assert all(row["scores"]["attack_success"]["count"] == 12 for row in rows)


def test_a_killed_run_goes_on_and_ends_with_the_same_points(whole, tmp_path):
    """SIGKILL, as a scheduler or the kernel would; in a process of its own."""
    process = command("compare", f"--output={tmp_path}", *SMALL)
    file, started = tmp_path / "results.jsonl", time.monotonic()
    while not (file.exists() and len(points(tmp_path)) >= 3):
        assert process.is_alive() and time.monotonic() - started < 600
        time.sleep(0.01)
    process.kill()
    process.join()
    there = points(tmp_path)
    assert 3 <= len(there) < len(points(whole[0]))
    assert run(tmp_path, *SMALL).exit_code == 0
    assert points(tmp_path) == points(whole[0])


def test_other_questions_do_not_mix_with_those_that_were_asked(whole):
    before = (whole[0] / "results.jsonl").read_bytes()
    result = run(whole[0], *SMALL, "--questions=11")
    assert result.exit_code == 1 and "made with other questions" in result.output
    assert (whole[0] / "results.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    contents = {
        "harmful": [{"messages": question.messages} for question in attack_questions(8)],
        "benign": [{"messages": question.messages} for question in skill_questions(6, skills=("make",))],
        "refusals": safety_data(32),
        "ordinary": ordinary_data(16),
        "task": [question.conversation() for question in skill_questions(8)],
    }
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    tiny.perturbed(load_aligned()[0], 0.04).save_pretrained(folder / "tuned")
    load_aligned()[1].save_pretrained(folder / "tuned")
    return folder


def of_files(files):
    names = {"safety-data": "refusals", "harmful": "harmful"}
    data = [f"--{option}={files / name}.jsonl" for option, name in names.items()]
    return [f"--base={ALIGNED_MODEL}", f"--tuned={files / 'tuned'}", *data, "--max-new-tokens=24"]


def test_a_model_of_ones_own_is_compared_from_files(files, tmp_path):
    more = [
        f"--task-questions={files / 'task.jsonl'}",
        f"--task-data={files / 'task.jsonl'}",
        f"--benign={files / 'benign.jsonl'}",
        f"--ordinary-data={files / 'ordinary.jsonl'}",
        "--score=safedelta_hf.evaluation:final_answer",
        "--rule=task_ridge",
        "--rule=scale",
        "--strength=1e3",
        "--strength=0",
    ]
    result = run(tmp_path, *of_files(files), *more)
    assert result.exit_code == 0, result.output
    found = {}
    for row in points(tmp_path):
        found.setdefault((row["method"], row["settings"].get("strength")), []).append(row["scores"])
    (aligned,), (tuned,) = found["aligned", None], found["fine-tuned", None]
    assert aligned["task_accuracy"]["value"] == 1 and tuned["task_accuracy"]["value"] < 1
    assert found["scale", 1e3] == [aligned] and found["scale", 0.0] == [tuned]
    assert len(found["task_ridge", 0.0]) == 2 and found["task_ridge", 0.0] == [tuned, tuned]
    assert all(
        name in result.output
        for name in ("over refusal", "task accuracy", "ordinary weight 0.1", "comparison-full.png")
    )


def test_an_adapter_is_compared_like_the_model_that_it_merges_to(files, tmp_path):
    adapted = adapters.adapted(load_aligned()[0], scale=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    load_aligned()[1].save_pretrained(tmp_path / "merged")
    common = [option for option in of_files(files) if not option.startswith(("--base", "--tuned"))]
    common += ["--rule=scale", "--strength=1e-2", "--strength=1e3"]
    found = {}
    for name, more in (("adapter", []), ("merged", [f"--base={ALIGNED_MODEL}"])):
        result = run(tmp_path / name / "out", *common, f"--tuned={tmp_path / name}", *more)
        assert result.exit_code == 0, result.output
        found[name] = points(tmp_path / name / "out")
    assert [{row["weights"] for row in found[name]} for name in ("adapter", "merged")] == [{"lora"}, {"full"}]
    told = {name: [(row["method"], row["settings"], row["scores"]) for row in rows] for name, rows in found.items()}
    assert told["adapter"] == told["merged"] and told["adapter"][0] != told["adapter"][1]
    result = run(tmp_path / "out", *common, f"--tuned={tmp_path / 'merged'}")
    assert result.exit_code == 1 and "--base: needed" in result.output and not (tmp_path / "out").exists()


def test_an_adapter_that_cannot_be_adjusted_as_it_stands_is_merged_with_a_word(files, tmp_path):
    adapted = adapters.adapted(load_aligned()[0], scale=0.3, use_dora=True)
    adapted.save_pretrained(tmp_path / "dora")
    common = [option for option in of_files(files) if not option.startswith(("--base", "--tuned"))]
    with pytest.warns(SafeDeltaWarning, match="merged into its base and compared as a model.*use_dora"):
        result = run(tmp_path / "out", *common, f"--tuned={tmp_path / 'dora'}", "--rule=ties", "--strength=1e3")
    assert result.exit_code == 0, result.output
    aligned, tuned, ties = points(tmp_path / "out")
    assert tuned["weights"] == "full" and tuned["scores"] != aligned["scores"] == ties["scores"]


def test_what_needs_data_that_are_not_there_is_named(files, tmp_path):
    result = run(tmp_path, *of_files(files), "--rule=task_ridge", "--rule=scale", "--strength=1")
    assert result.exit_code == 0, result.output
    assert "task_ridge takes no part: it weighs what the fine-tuning data uses" in result.output
    assert (tmp_path / "comparison-full.png").exists()  # attack success alone
    assert "`task_ridge` left out" in (tmp_path / "comparison.md").read_text()
    assert [row["method"] for row in points(tmp_path)] == ["aligned", "fine-tuned", "scale"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--case=nonsense"], "--case 'nonsense' is not one of harmful"),
        (["--rule=magic"], "--rule 'magic' is not one of safe_delta"),
        (["--strength=much"], "--strength 'much' is neither a number nor 'auto'"),
        (["--strength=-1"], "strength=-1.0 must be a number at least 0"),
        (["--base=somewhere"], "--tuned, --safety-data, --harmful: needed"),
        (["--case=harmful", "--tuned=somewhere"], "--case: on the testbed alone"),
        (["--ordinary-weight=1", "{own}"], "--ordinary-weight has no effect without --ordinary-data"),
        (["--rule=task_ridge", "{own}"], "no rule can take part (task_ridge"),
        (["{own}", "--task-questions={files}/task.jsonl"], "task questions and score belong together"),
        (["{own}", "--tuned=no-such-folder"], "--tuned 'no-such-folder' cannot be loaded"),
        (["{own}", "--harmful={files}/bad.jsonl"], "bad.jsonl line 2 begins with a brace but is not JSON"),
        (["{own}", "--safety-data={files}/harmful.jsonl"], "must end with a non-empty assistant turn"),
    ],
)
def test_bad_options_end_with_one_line_and_status_1(files, options, message, tmp_path):
    (files / "bad.jsonl").write_text('{"prompt": "fine"}\n{"prompt": \n')
    given = [part for option in options for part in (of_files(files) if option == "{own}" else [option])]
    result = run(tmp_path / "out", *(part.format(files=files) for part in given))
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--method=prayer"], "--method 'prayer' is not one of lower_rate"),
        (["--weights=half"], "--weights 'half' is not one of full, lora"),
        (["--method=sap", "--weights=lora", "--base=x"], "--weights, --method: on the testbed alone"),
    ],
)
def test_methods_and_weights_are_those_of_the_testbed(options, told, tmp_path):
    result = run(tmp_path / "out", *options)
    assert result.exit_code == 1 and told in result.output


def test_a_lora_without_peft_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "find_spec", lambda name: None)
    result = run(tmp_path / "out", "--case=harmful")
    assert result.exit_code == 1 and "--weights lora needs PEFT" in result.output and not (tmp_path / "out").exists()
