import pytest
import typer
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from safedelta_hf.errors import ConfigurationError
from safedelta_hf.testbed import train


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("train") / "model"
    losses = train.train_aligned(output, knowledge_steps=2, alignment_steps=2, progress=False)
    return output, losses


def test_training_writes_a_folder_that_loads(tiny_run):
    output, losses = tiny_run
    model, tokenizer = LlamaForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert all(loss > 0 for loss in losses)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert [path.name for path in output.parent.iterdir()] == ["model"]


def test_training_twice_gives_the_same_file(tiny_run, tmp_path):
    train.train_aligned(tmp_path / "again", knowledge_steps=2, alignment_steps=2, progress=False)
    first, again = (folder / "model.safetensors" for folder in (tiny_run[0], tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()


def test_existing_output_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="not an empty folder"):
        train.train_aligned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_command_reports_an_existing_output(tmp_path):
    app = typer.Typer()
    app.command()(train.main)
    (tmp_path / "note.txt").write_text("mine")
    result = CliRunner().invoke(app, ["--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "not an empty folder" in result.output


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train.train_aligned(tmp_path / "model", knowledge_steps=1, alignment_steps=1, progress=False)
    assert not list(tmp_path.iterdir())
