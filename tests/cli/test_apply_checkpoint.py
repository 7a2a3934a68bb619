import dataclasses
import json

import pytest
from typer.testing import CliRunner

from safedelta_hf import ProfileConfig, Ridge, Scale
from safedelta_hf.cli.main import app, loaded
from tests.fixtures import checkpoints
from tests.fixtures.checkpoints import contents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return checkpoints.case(tmp_path_factory.mktemp("case"), "one layer")


@pytest.fixture
def case(made, tmp_path):
    return made.copy_to(tmp_path)


def apply(case, *options, **paths):
    given = {name: str(path) for name, path in (case.paths | paths).items() if path is not None}
    return CliRunner().invoke(app, ["apply", *(f"--{name}={path}" for name, path in given.items()), *map(str, options)])


def test_it_writes_the_adjusted_model_and_a_report_beside_it(case):
    (case.tuned / "optimizer.pt").write_bytes(b"state")
    result = apply(case, "--strength", 100, "--report", case.folder / "report.json")
    assert result.exit_code == 0, result.output
    assert "12 weights adjusted" in result.output and "Not copied: optimizer.pt" in result.output
    case.adjust(output=case.folder / "expected", rule=Ridge(strength=100.0))
    assert contents(case.output) == contents(case.folder / "expected")
    report = json.loads((case.folder / "report.json").read_text())
    assert len(report["parameters"]) == 12 and report["rule"]["settings"]["strength"] == 100


def test_a_dry_run_prints_the_plan_and_writes_nothing(case):
    before = contents(case.folder)
    result = apply(case, "--dry-run", "--strength", 1)
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in case.profile.header.base) and "Copied: chat_template" in result.output
    assert contents(case.folder) == before


def test_a_task_profile_and_a_treatment_are_passed_on(case):
    result = apply(case, "--rule", "task_ridge", "--strength", 1, "--task-profile", case.folder / "profile")
    assert result.exit_code == 0, result.output
    result = apply(case, "--strength", 1, "--uncovered", "magic", output=case.folder / "other")
    assert result.exit_code == 1 and "uncovered='magic' is not one of ['error', 'keep', 'reset']" in result.output


def test_a_rule_that_reads_no_moments_asks_for_no_data(case):
    result = apply(case, "--rule", "scale", "--strength", 1, "--dry-run", profile=None)
    assert result.exit_code == 0 and not case.output.exists(), result.output
    result = apply(case, "--rule", "scale", "--strength", 1, profile=None)
    assert result.exit_code == 0 and "no safety data were read" in result.output, result.output
    shown = CliRunner().invoke(app, ["show", str(case.output)])
    assert shown.exit_code == 0 and "Safety data: none were read." in shown.output
    case.adjust(output=case.folder / "expected", rule=Scale(strength=1.0))
    assert contents(case.output) == contents(case.folder / "expected")


def test_how_data_is_read_is_asked_as_by_the_profile_command_and_passed_on(case, monkeypatch):
    own, other = ({one.name: one for one in loaded(name).params} for name in ("apply", "profile"))
    for field in dataclasses.fields(ProfileConfig):
        if not field.name.startswith("layers"):
            assert (own[field.name].help, own[field.name].default) == (
                other[field.name].help,
                other[field.name].default,
            )
    seen = []
    monkeypatch.setattr("safedelta_hf.saved.adjust.adjust_saved", lambda **given: seen.append(given) or case.adjust())
    options = [
        "--holdout=.5",
        "--targets=q_proj",
        "--no-share-moments",
        "--moment-memory=1000",
        f"--offload-folder={case.folder}",
    ]
    given = {"safety-data": case.folder / "rows.jsonl", "ordinary-profile": case.folder / "profile", "profile": None}
    result = apply(case, "--strength", 1, *options, **given)
    assert result.exit_code == 0, result.output
    assert seen[0]["ordinary_profile"] == case.folder / "profile"
    assert seen[0]["config"] == ProfileConfig(
        holdout=0.5, targets=["q_proj"], share_moments=False, moment_memory=1000, offload_folder=case.folder
    )


@pytest.mark.parametrize(
    ("options", "paths", "message"),
    [
        (["--strength", "1"], {"base": None}, "base: a whole model needs it (--base)"),
        ([], {"profile": None}, "give either safety_dataset or profile (--safety-data FILE"),
        (["--initial-adapter", "somewhere", "--strength", "1"], {}, "(--initial-adapter): '"),
        (["--dry-run"], {"profile": None}, "--dry-run needs --base and --profile"),
        (["--ordinary-weight", "1"], {}, "--ordinary-weight has no effect without --ordinary-data"),
        (["--holdout", ".5"], {}, "--holdout has no effect without --safety-data"),
        (
            ["--targets", "q_proj", "--batch-size", "2"],
            {},
            "--batch-size, --targets: has no effect where no data is read",
        ),
        (["--rule", "scale"], {"profile": None}, "give either safety_dataset or profile"),
        (["--save-profile", "somewhere"], {}, "save_profile has no effect beside a profile made before"),
        (["--strength", "auto"], {}, "ridge: strength='auto' measures refusals on safety data that no moment has seen"),
        ([], {}, "ridge: strength='auto' measures refusals"),
        (["--task-profile", "{profile}"], {}, "task_ridge: strength='auto'"),
        (["--rule", "task_ridge", "--strength", "1"], {}, "give task_dataset (--task-data FILE"),
        (["--device", "abacus", "--strength", "1"], {}, "device='abacus' cannot be used here"),
    ],
)
def test_errors_end_with_one_line_and_status_1(options, paths, message, case):
    result = apply(case, *(option.format(profile=case.folder / "profile") for option in options), **paths)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output
    assert result.output.startswith("safedelta: ") and len(result.output.splitlines()) == 1
    assert not case.output.exists() and not case.work.exists()


def test_a_malformed_checkpoint_ends_with_one_line(case):
    (case.tuned / "model.safetensors.index.json").write_text("{")
    result = apply(case, "--strength", 1)
    assert result.exit_code == 1 and "is no index of shards" in result.output and "Traceback" not in result.output
