import json
import math
import signal
import time

import pytest
from typer.testing import CliRunner

from safedelta_hf import ProfileConfig, SafetyProfile, collect_profile
from safedelta_hf.capture import collect as module
from safedelta_hf.cli.main import app
from safedelta_hf.errors import ProfileError
from safedelta_hf.modules import loading
from safedelta_hf.testbed import ALIGNED_MODEL, CASES, load_aligned, safety_data
from safedelta_hf.testbed.data import ordinary_data
from tests.fixtures import adapters
from tests.fixtures.fake_hub import connected
from tests.profile.saved_profiles import contents, same_moments
from tests.programs.launching import command

REFUSALS = safety_data(24)


@pytest.fixture
def files(tmp_path):
    rows = {"refusals": REFUSALS, "task": CASES["benign"].examples()[:12], "ordinary": ordinary_data()[:12]}
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    return tmp_path


def arguments(files, *options, data="safety-data", name="refusals"):
    given = [f"--model={ALIGNED_MODEL}", f"--{data}={files / f'{name}.jsonl'}", f"--output={files / 'profile'}"]
    return ["profile", *given, *options]


def run(*given):
    return CliRunner().invoke(app, list(map(str, given)))


def test_it_writes_what_python_writes(files):
    result = run(*arguments(files, "--holdout=0.5", "--batch-size=4", "--storage=bfloat16"))
    assert result.exit_code == 0, result.output
    model, tokenizer = load_aligned()
    expected = collect_profile(
        model, REFUSALS, tokenizer, config=ProfileConfig(holdout=0.5, batch_size=4), progress=False
    )
    expected.save(files / "expected", "bfloat16")
    assert contents(files / "profile") == contents(files / "expected")
    assert "LlamaForCausalLM: 27 moments" in result.output and str(files / "profile") in result.output


def test_the_profile_of_an_adapter_is_that_of_its_base(files):
    adapters.adapted(load_aligned()[0], r=2).save_pretrained(files / "adapter")
    given = arguments(files)
    result = run(*given[:1], f"--model={files / 'adapter'}", *given[2:])
    assert result.exit_code == 0, result.output
    assert f"the profile is that of its base, {ALIGNED_MODEL}" in result.output
    collect_profile(load_aligned()[0], REFUSALS, load_aligned()[1], progress=False).save(files / "expected")
    assert contents(files / "profile") == contents(files / "expected")


def test_ordinary_data_is_protected_too(files):
    result = run(*arguments(files, f"--ordinary-data={files / 'ordinary.jsonl'}", "--ordinary-weight=0.3"))
    assert result.exit_code == 0, result.output
    found = SafetyProfile.load(files / "profile").header.retention
    assert (found.sequences, found.weight) == (12, 0.3)


def test_a_profile_of_the_task_holds_nothing_out(files):
    result = run(*arguments(files, "--targets=q_proj", "--dtype=bfloat16", data="task-data", name="task"))
    assert result.exit_code == 0, result.output
    found = SafetyProfile.load(files / "profile")
    assert found.held_out is None and found.header.sequences == 12 and set(found.header.dtypes.values()) == {"bfloat16"}
    assert "not covered: model.layers.0.mlp.gate_proj.weight: it is not among the targets" in result.output


def test_a_task_is_sorted_by_safety_data_and_the_command_says_what_was_left_out(files):
    rows = CASES["mixed"].examples()[:30]
    (files / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(*arguments(files, f"--sorted-by={files / 'refusals.jsonl'}", data="task-data", name="task"))
    assert result.exit_code == 0, result.output
    header = SafetyProfile.load(files / "profile").header
    assert 0 < header.sorting.left_out == 30 - header.sequences
    assert f"refuse {header.sorting.left_out} of 30 examples" in result.output and "not sorted" not in result.output


def test_a_task_of_which_nothing_is_left_is_one_line_and_no_folder(files):
    (files / "task.jsonl").write_text("\n".join(map(json.dumps, CASES["harmful"].examples()[:12])))
    result = run(*arguments(files, f"--sorted-by={files / 'refusals.jsonl'}", data="task-data", name="task"))
    assert result.exit_code == 1 and "Nothing is left" in result.output and not (files / "profile").exists()


def test_a_killed_run_goes_on_with_the_rest_and_ends_with_the_same_bytes(files):
    options = ["--save-every=2", "--batch-size=1"]
    sums = files / ".profile.sums"
    process = command(*arguments(files, *options))
    until = time.monotonic() + 240
    while not list(sums.glob("*-00003")) and process.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and sums.exists() and not (files / "profile").exists()
    read, whole = [], module.capture_profile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "capture_profile", lambda *given, **rest: read.append(given) or whole(*given, **rest))
        assert run(*arguments(files, *options)).exit_code == 0
    needed = math.ceil(SafetyProfile.load(files / "profile").header.sequences / 2)
    assert 0 < len(read) <= needed - 3 and not sums.exists()
    killed = contents(files / "profile")
    (files / "profile").rename(files / "elsewhere")
    assert run(*arguments(files, *options)).exit_code == 0
    assert contents(files / "profile") == killed


def test_it_goes_to_the_hub_as_well(files, monkeypatch):
    with connected(monkeypatch) as hub:
        result = run(*arguments(files, "--push-to-hub=org/profile", "--private"))
        assert result.exit_code == 0, result.output
        assert f"Uploaded: {hub.url}/org/profile" in result.output and hub.private["org/profile"] in (True, "private")
        found = SafetyProfile.load("org/profile", cache_dir=files / "cache")
        assert same_moments(found, SafetyProfile.load(files / "profile"))


def test_what_the_hub_refuses_is_saved_all_the_same_and_can_be_uploaded_as_it_says(files, monkeypatch):
    def refuse(*_, **__):
        raise ProfileError("profile: the Hub refuses")

    with monkeypatch.context() as patch:
        patch.setattr("safedelta_hf.profile.profile.upload", refuse)
        result = run(*arguments(files, "--push-to-hub=org/profile", "--private", "--save-every=4"))
    assert result.exit_code == 1 and "the Hub refuses" in result.output and "is saved in" in result.output
    assert not (files / ".profile.sums").exists()
    with connected(monkeypatch) as hub:
        eval(result.output.splitlines()[-1].partition("upload it with ")[2])
        found = SafetyProfile.load("org/profile", cache_dir=files / "cache")
        assert hub.private["org/profile"] in (True, "private")
        assert same_moments(found, SafetyProfile.load(files / "profile"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task-data=x.jsonl"], "give one of --safety-data and --task-data"),
        (["--sorted-by=x.jsonl"], "--sorted-by has no effect without --task-data"),
        (["--ordinary-weight=1"], "--ordinary-weight has no effect"),
        (["--private"], "--private has no effect"),
        (["--push-to-hub=no name"], "--push-to-hub 'no name' is no name of a repository"),
        (["--push-to-hub=a/b/c"], "--push-to-hub 'a/b/c' is no name of a repository"),
        *(
            (["--ordinary-data=x", f"--ordinary-weight={weight}"], "must be a positive")
            for weight in (-1, 0, "nan", "inf")
        ),
        (["--ordinary-data=absent"], "ordinary data: there is no file 'absent'"),
        (["--ordinary-data=/proc/self/mem"], "ordinary data: '/proc/self/mem' cannot be read"),
        (["--max-length=1"], "safety data: "),
        (["--dtype=int3"], "--dtype 'int3' is not one of"),
        (["--storage=zip"], "storage='zip' is not one of"),
        (["--storage=eigenbasis"], "needs a rank"),
        (["--holdout=2"], "holdout=2"),
        (["--moment-memory=much"], "moment_memory='much'"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_loaded(files, monkeypatch, options, message):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    result = run(*arguments(files, *options))
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert result.output.startswith("safedelta: ") and message in result.output


def test_a_folder_that_is_there_is_not_overwritten(files, monkeypatch):
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    (files / "profile").mkdir()
    (files / "profile" / "precious").touch()
    result = run(*arguments(files))
    assert result.exit_code == 1 and "exists already" in result.output and (files / "profile" / "precious").exists()


def test_a_model_that_is_not_there_is_one_line(files):
    result = run(*arguments(files)[:1], "--model=/nowhere", *arguments(files)[2:])
    assert result.exit_code == 1 and "--model '/nowhere' cannot be loaded" in result.output
