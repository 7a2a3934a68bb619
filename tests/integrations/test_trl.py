"""TRL's scripts, run whole, save an adjusted model."""

import json

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from safedelta_hf.integrations import running, trl
from tests.integrations.files import require_halved, write

BASE = {
    "model_name_or_path": "model",
    "output_dir": "run",
    "num_train_epochs": 2,
    "learning_rate": 0.01,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "down_proj"], "lora_r": 4}


def data(name):
    return {"datasets": [{"path": "json", "data_files": f"{name}.jsonl", "split": "train"}]}


@pytest.mark.parametrize(
    "script, rows, changes", [("sft", "train", {}), ("sft", "train", LORA), ("dpo", "preferences", LORA)]
)
def test_what_a_script_saves_is_adjusted(script, rows, changes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {**BASE, **data(rows), **changes})
    trl.main([script, "--config", "train.yaml", "--learning_rate", "0.02"])
    require_halved(tmp_path / "run", tmp_path / "before", tmp_path / "model")
    assert json.loads((tmp_path / "run" / running.REPORT).read_text())["rule"]["name"] == "scale"
    assert "Safe Delta" in capsys.readouterr().out


def test_trl_makes_its_own_trainers_again_afterwards(tmp_path):
    import trl as library

    before = library.SFTTrainer
    with pytest.raises(RuntimeError), trl.added(None, "SFTTrainer"):
        assert library.SFTTrainer.func is before
        raise RuntimeError
    assert library.SFTTrainer is before


@pytest.mark.parametrize(
    "words, told",
    [
        (["grpo", "--config", "train.yaml"], "'grpo' is not one of sft, dpo"),
        ([], "'' is not one of sft, dpo"),
        (["sft"], "give --config with a YAML file"),
        (["sft", "--config", "nowhere.yaml"], "'nowhere.yaml' cannot be read"),
        (["sft", "--config", "broken.yaml"], "'broken.yaml' cannot be read"),
        (["sft", "--config", "plain.yaml"], "'plain.yaml' has no section `safedelta:`"),
        (["sft", "--config", "train.yaml", "--lerning_rate", "1"], "does not know --lerning_rate 1"),
        (["sft", "--config", "odd.yaml"], "does not know --num_processes 2"),
        (["sft", "--config", "lost.yaml"], "nowhere.jsonl"),
    ],
)
def test_a_wrong_use_is_told_in_one_line_before_anything_is_loaded(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {**BASE, **data("train")})
    config = (tmp_path / "train.yaml").read_text()
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "plain.yaml").write_text("learning_rate: 0.1")
    (tmp_path / "odd.yaml").write_text(f"{config}num_processes: 2\n")
    (tmp_path / "lost.yaml").write_text(config.replace("refusals.jsonl", "nowhere.jsonl"))
    with pytest.raises(SystemExit) as ended:
        trl.main(words)
    shown = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1 and shown[-1].startswith("safedelta: ") and told in shown[-1]
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(running, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        trl.main(["sft"])
    assert "trl is not installed in this environment; pip install trl" in capsys.readouterr().err
