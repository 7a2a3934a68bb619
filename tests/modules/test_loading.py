"""A model, and an adapter with the base that it names, are loaded alike."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.modules.loading import Source, load_model, load_tokenizer, source_of
from tests.fixtures import adapters, tiny

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny.llama().save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapters.adapted(base).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(settings))
    return tmp_path


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 9)[None]).logits


def test_a_model_stands_for_itself_and_an_adapter_for_its_base_below_it(folder):
    base, adapter = str(folder / "base"), str(folder / "adapter")
    assert source_of(base, "--model") == Source(base)
    assert source_of(adapter, "--model") == Source(base, None, adapter)
    assert source_of(adapter, "--model", "elsewhere") == Source("elsewhere", None, adapter)


def test_an_adapter_is_loaded_on_the_base_that_it_names_or_is_given(folder):
    expected = logits(adapters.adapted(tiny.llama()))
    loaded, tokenizer = load_model(str(folder / "adapter"), "--model")
    merged, _ = load_model(str(folder / "adapter"), "--model", merged=True)
    torch.testing.assert_close(logits(loaded), expected)
    torch.testing.assert_close(logits(merged), expected)
    assert loaded.peft_config and not getattr(merged, "peft_config", None)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    (folder / "base").rename(folder / "moved")
    again, _ = load_model(str(folder / "adapter"), "--model", base=str(folder / "moved"))
    torch.testing.assert_close(logits(again), expected)
    with pytest.raises(ConfigurationError, match=r"its base '.*base' cannot be loaded"):
        load_model(str(folder / "adapter"), "--model")


def test_an_adapter_has_its_own_tokenizer_if_it_has_one(folder):
    source = source_of(str(folder / "adapter"), "--model")
    assert load_tokenizer(source, "it").chat_template
    tiny.tokenizer(with_template=False).save_pretrained(folder / "adapter")
    assert not load_tokenizer(source, "it").chat_template


def test_an_adapter_in_the_folder_of_its_model_is_not_taken_for_merged(folder):
    shutil.copytree(folder / "base", folder / "adapter", dirs_exist_ok=True)
    loaded, _ = load_model(str(folder / "adapter"), "--model")
    torch.testing.assert_close(logits(loaded), logits(adapters.adapted(tiny.llama())))
    with pytest.raises(ConfigurationError, match="holds a model and an adapter; merge them"):
        load_model(str(folder / "adapter"), "--tuned", merged=True)


@pytest.mark.parametrize("named", [None, "", 5, ["base"]])
def test_an_adapter_of_no_base_is_refused(folder, named):
    (folder / "adapter" / CONFIG).write_text(json.dumps({"base_model_name_or_path": named}))
    with pytest.raises(ConfigurationError, match="does not say of which base"):
        source_of(str(folder / "adapter"), "--model")


@pytest.mark.parametrize("text", ["{", "[]", "5", "{}", "\ud800", "[" * 100_000])
def test_a_malformed_configuration_is_refused(folder, text):
    (folder / "adapter" / CONFIG).write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigurationError, match="--model .*cannot be loaded"):
        source_of(str(folder / "adapter"), "--model")
