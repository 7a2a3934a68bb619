"""The page for a start on a real model, with the model of this package in place of a real one."""

import functools
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import is_torch_bf16_gpu_available

from safedelta_hf.data.prompt_sets import PROMPT_SETS
from safedelta_hf.testbed import ALIGNED_MODEL, CASES, attack_questions, load_aligned, safety_data, skill_questions
from tests.fixtures import blocks, tiny

PAGE = Path(__file__).parents[1] / "docs" / "start.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    files = {
        "harmful": [{"messages": question.messages} for question in attack_questions(4)],
        "benign": [{"messages": question.messages} for question in skill_questions(4, skills=("make",))],
        "train": CASES["mixed"].examples()[:24],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, tokenizer = load_aligned()
    for saved in (tiny.perturbed(model, seed=1), tokenizer):
        saved.save_pretrained(tmp_path / "tuned")
    prompts = [row["messages"][-2]["content"] for row in safety_data(24)]
    monkeypatch.setattr(type(PROMPT_SETS["advbench"]), "prompts", lambda _: prompts)
    monkeypatch.setenv("BASE", str(ALIGNED_MODEL))
    if not is_torch_bf16_gpu_available():  # as the page says
        monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, use_cpu=True))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::safedelta_hf.errors.SafeDeltaWarning")
def test_every_command_of_the_page_runs(folder):
    for block in blocks.blocks_of(PAGE):
        if block.reason == "installs packages":
            continue
        if block.language == "bash":
            blocks.run_shell(block, folder)
        elif block.language == "python":
            blocks.run_python(block, {"__name__": "page"}, {})
            (folder / "adjusted").rename(folder / "adjusted-adapter")
    assert len((folder / "refusals.jsonl").read_text().splitlines()) >= 16
    assert (folder / "adjusted-adapter" / "adapter_model.safetensors").is_file()
    for name in ("adjusted", "by-number"):
        AutoModelForCausalLM.from_pretrained(folder / name)
    assert (folder / "results" / "results.json").is_file()


def test_the_page_names_every_set_of_prompts_with_its_licence():
    text = PAGE.read_text()
    for one in PROMPT_SETS.values():
        title, licence = one.title.split(",")[0], one.licence
        assert title in text and (licence in text or licence == "its own terms"), one.title
