"""The plug-in of Axolotl: its schema and hooks, and, where Axolotl is installed, a whole run."""

import importlib
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
from pydantic import ValidationError

from safedelta_hf.errors import ConfigurationError, DataError
from safedelta_hf.integrations import running
from tests.fixtures import tiny
from tests.integrations.files import SECTION, require_halved, write

NAME = "safedelta_hf.integrations.axolotl"


@pytest.fixture
def module(monkeypatch):
    """The plug-in's module, beside Axolotl's base class or, where that is missing, one with the hooks that are used."""
    if find_spec("axolotl") is None:

        class BasePlugin:
            """As in axolotl/integrations/base.py of 0.19.0: hooks that do nothing."""

            def __init__(self): ...
            def get_input_args(self): ...
            def load_datasets(self, cfg, preprocess=False): ...
            def add_callbacks_post_trainer(self, cfg, trainer): ...
            def post_train(self, cfg, model): ...
            def post_train_unload(self, cfg): ...

        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
        monkeypatch.delitem(sys.modules, NAME, raising=False)
        yield importlib.import_module(NAME)
        sys.modules.pop(NAME, None)
    else:
        yield importlib.import_module(NAME)


def arguments_of(module):
    path, name = module.SafeDeltaPlugin().get_input_args().rsplit(".", 1)
    return getattr(importlib.import_module(path), name)


def test_a_section_passes_validation_as_it_stands(module):
    section = {**SECTION, "polish": {"steps": 3}}
    config = {"plugins": [module.PLUGIN], "safedelta": section}
    assert arguments_of(module)(**config).model_dump(exclude_none=True) == {"safedelta": section}


@pytest.mark.parametrize(
    "config, told",
    [
        ({"safedelta": {"saftey_dataset": "x"}}, "did you mean 'safety_dataset'?"),
        ({"safedelta": "refusals.jsonl"}, "must be a mapping of settings"),
        ({"safedelta": {"strength": -1}}, "strength=-1 must be a number at least 0"),
        ({}, "a section `safedelta:` is needed"),
        ({"safedelta": {}, "relora": True}, "relora merges the adapter into the base"),
    ],
)
def test_a_section_that_cannot_be_used_fails_validation(module, config, told):
    with pytest.raises(ValidationError) as caught:
        arguments_of(module)(**{"plugins": [module.PLUGIN], **config})
    assert told in str(caught.value)


def test_a_plugin_that_a_configuration_does_not_name_does_nothing(module, tmp_path):
    assert arguments_of(module)(plugins=["another"]).safedelta is None
    plugin = module.SafeDeltaPlugin()
    assert plugin.load_datasets({}) is None and plugin.add_callbacks_post_trainer({}, None) == []
    plugin.post_train({"output_dir": str(tmp_path)}, None)
    plugin.post_train_unload({"output_dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_told_before_the_model_is_loaded(module):
    plugin = module.SafeDeltaPlugin()
    plugin.load_datasets({"safedelta": {**SECTION, "safety_dataset": "nowhere.jsonl"}}, preprocess=True)
    with pytest.raises(DataError, match="nowhere.jsonl"):
        plugin.load_datasets({"safedelta": {**SECTION, "safety_dataset": "nowhere.jsonl"}})
    with pytest.raises(ConfigurationError, match="either safety_dataset or profile"):
        plugin.load_datasets({"safedelta": {"rule": "ridge"}})


def test_the_hooks_adjust_what_is_trained_and_leave_a_report(module, tmp_path, capsys, llama):
    config = {
        "output_dir": str(tmp_path / "run"),
        "safedelta": {"safety_dataset": tiny.rows(16, seed=1), "rule": "scale", "strength": 1.0},
    }
    plugin = module.SafeDeltaPlugin()
    assert plugin.load_datasets(config) is None
    trainer = tiny.trainer(llama, None, tmp_path / "run", disable_tqdm=False)
    for callback in plugin.add_callbacks_post_trainer(config, trainer):
        trainer.add_callback(callback)
    trainer.train()
    for _ in range(2):  # as Axolotl does
        plugin.post_train(config, trainer.model)
        assert (tmp_path / "run" / running.REPORT).exists()
    assert "Safe Delta" not in capsys.readouterr().out
    plugin.post_train_unload(config)
    assert capsys.readouterr().out.count("Safe Delta: ") == 1


CONFIG = {
    "base_model": "model",
    "datasets": [{"path": "train.jsonl", "ds_type": "json", "type": "chat_template"}],
    "chat_template": "tokenizer_default",
    "dataset_prepared_path": "prepared",
    "output_dir": "run",
    "sequence_len": 32,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_epochs": 2,
    "learning_rate": 0.01,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "save_strategy": "no",
    "bf16": False,
    "special_tokens": {"pad_token": "<pad>"},
    "plugins": ["safedelta_hf.integrations.axolotl.SafeDeltaPlugin"],
}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "down_proj"]}
LORA |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)  # which need a GPU


@pytest.mark.skipif(
    find_spec("axolotl") is None, reason="Axolotl is not installed; it is tried in an environment of its own"
)
@pytest.mark.parametrize("changes", [{}, LORA], ids=["all weights", "LoRA"])
def test_axolotl_saves_what_was_adjusted(changes, tmp_path):
    write(tmp_path, {**CONFIG, **changes})
    command = [sys.executable, "-m", "axolotl.cli.main", "train", "train.yaml", "--launcher", "python"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    require_halved(tmp_path / "run", tmp_path / "before", tmp_path / "model")
    assert (tmp_path / "run" / running.REPORT).exists()
    assert "Safety adjustment" in (tmp_path / "run" / "README.md").read_text()
    assert (ended.stdout + ended.stderr).count("Safe Delta: Refusals") == 1
