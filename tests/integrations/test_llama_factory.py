"""The launcher of LLaMA-Factory: what it takes out, what it refuses, and, where that is installed, whole runs."""

import importlib.util
import json
import subprocess
import sys
import types

import pytest

from safedelta_hf.errors import AdjustmentError, ConfigurationError
from safedelta_hf.integrations import llama_factory, running
from tests.fixtures import tiny
from tests.integrations.files import SECTION, require_halved, write

CONFIG = {
    "model_name_or_path": "model",
    "stage": "sft",
    "do_train": True,
    "dataset_dir": "data",
    "output_dir": "run",
    "cutoff_len": 32,
    "num_train_epochs": 2,
    "learning_rate": 0.01,
    "report_to": "none",
    "save_strategy": "no",
}


@pytest.fixture
def stand_in(monkeypatch):
    """Of LLaMA-Factory, what the launcher calls: `read_args` of the command line, and `run_exp`, which trains."""
    ran = []

    def run_exp(args=None, callbacks=None):
        ran.append(args)
        if args.get("do_train"):
            trainer = tiny.trainer(tiny.loaded(args["model_name_or_path"]), callbacks[0], args["output_dir"])
            trainer.train()
            trainer.save_model()

    def read_args(args=None):
        import yaml

        return yaml.safe_load(open(sys.argv[1])) if sys.argv[1].endswith(".yaml") else sys.argv[1:]

    for name, members in {
        "llamafactory": {"__spec__": importlib.util.spec_from_loader("llamafactory", None)},
        "llamafactory.hparams": {"read_args": read_args},
        "llamafactory.train": {},
        "llamafactory.train.tuner": {"run_exp": run_exp},
    }.items():
        module = types.ModuleType(name)
        for member, value in members.items():
            setattr(module, member, value)
        monkeypatch.setitem(sys.modules, name, module)
    return ran


def start(monkeypatch, tmp_path, *words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llama_factory", *words])
    llama_factory.main()


def test_the_section_is_taken_out_and_what_is_saved_is_adjusted(stand_in, monkeypatch, tmp_path):
    write(tmp_path, CONFIG, {**SECTION, "safety_dataset": [tiny.rows(1, seed=n)[0] for n in range(16)]})
    start(monkeypatch, tmp_path, "train.yaml")
    assert stand_in == [CONFIG]
    assert (tmp_path / "run" / running.REPORT).exists()
    require_halved(tmp_path / "run", tmp_path / "before", tmp_path / "model")


def test_a_run_that_trains_nothing_is_an_error(stand_in, monkeypatch, tmp_path):
    write(tmp_path, {**CONFIG, "do_train": False})
    with pytest.raises(AdjustmentError, match="nothing was adjusted"):
        start(monkeypatch, tmp_path, "train.yaml")


@pytest.mark.parametrize(
    "args, told",
    [
        (["--stage", "sft"], "give a YAML file with a section `safedelta:`"),
        ({"stage": "sft"}, "give a YAML file with a section `safedelta:`"),
        ({"stage": "ppo", "safedelta": {}}, "stage='ppo' is not one of pt, sft, dpo, kto"),
        ({"safedelta": {"rul": "ridge"}}, "did you mean 'rule'?"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_named(args, told):
    with pytest.raises(ConfigurationError) as caught:
        llama_factory.without_section(args)
    assert told in str(caught.value)


def test_a_wrong_use_ends_before_the_run(stand_in, monkeypatch, tmp_path, capsys):
    write(tmp_path, CONFIG, {**SECTION, "safety_dataset": "nowhere.jsonl"})
    with pytest.raises(SystemExit) as ended:
        start(monkeypatch, tmp_path, "train.yaml")
    assert ended.value.code == 1 and "nowhere.jsonl" in capsys.readouterr().err and not stand_in


LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,down_proj"}
FULL = {"finetuning_type": "full"}


@pytest.mark.skipif(
    importlib.util.find_spec("llamafactory") is None,
    reason="LLaMA-Factory is not installed; it is tried in an environment of its own",
)
@pytest.mark.parametrize("form", ["alpaca", "sharegpt"])
@pytest.mark.parametrize("changes", [LORA, FULL], ids=["LoRA", "all weights"])
def test_llama_factory_saves_what_was_adjusted(form, changes, tmp_path):
    write(tmp_path, {**CONFIG, **changes, "dataset": form})
    said = [[turn["content"] for turn in row["messages"]] for row in tiny.conversations(8)]
    turns = [[{"from": "human", "value": asked}, {"from": "gpt", "value": answer}] for asked, answer in said]
    rows = {
        "alpaca": [{"instruction": asked, "input": "", "output": answer} for asked, answer in said],
        "sharegpt": [{"conversations": conversation} for conversation in turns],
        "dataset_info": {
            "alpaca": {"file_name": "alpaca.json"},
            "sharegpt": {"file_name": "sharegpt.json", "formatting": "sharegpt"},
        },
    }
    (tmp_path / "data").mkdir()
    for name, content in rows.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "safedelta_hf.integrations.llama_factory", "train.yaml", "learning_rate=0.02"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    require_halved(tmp_path / "run", tmp_path / "before", tmp_path / "model")
    assert (tmp_path / "run" / running.REPORT).exists()
    assert "Safety adjustment" in (tmp_path / "run" / "README.md").read_text()
    assert (ended.stdout + ended.stderr).count("Safe Delta: Refusals") == 1
