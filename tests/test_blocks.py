"""What the pages show runs as it stands, or says why it cannot be run by a test, and is then at least well formed."""

import json
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import safedelta_hf
from safedelta_hf import ProfileConfig, Ridge, collect_profile
from safedelta_hf.evaluation import Guard, final_answer
from safedelta_hf.testbed import (
    ALIGNED_MODEL,
    CASES,
    attack_questions,
    load_aligned,
    new_skill_questions,
    ordinary_data,
    preference_pairs,
    safety_data,
    skill_questions,
    tokenize,
)
from tests.fixtures import blocks, tiny

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): blocks.blocks_of(path)
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
}
CODE = {page: [block for block in found if block.language] for page, found in PAGES.items()}

REASONS = {
    "installs packages",
    "downloads a model or data",
    "needs a GPU",
    "needs several processes",
    "takes minutes or hours",
    "part of another project",
    "needs a file that the reader writes",
}
"""Why a block may not be run."""

CHECKS = {
    "python": blocks.unknown_in_python,
    "bash": blocks.unknown_in_shell,
    "yaml": lambda text: [] if yaml.safe_load(text) else ["empty"],
    "json": lambda text: [] if json.loads(text) else ["empty"],
    "text": lambda text: [],
}
"""What a block in a language must be, whether it is run or not: what it says wrong."""

ELSEWHERE = {
    "docs/profiles.md": "tests/test_profiles_page.py",
    "docs/start.md": "tests/test_start_page.py",
    "docs/training/data.md": "tests/training/test_data_page.py",
    "docs/rules/safe_patching.md": "tests/rules/test_safe_patching_page.py",
}
"""Pages whose blocks are run by a test of their own."""


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A folder of a model that was moved a little from its base."""
    model, tokenizer = load_aligned()
    folder = tmp_path_factory.mktemp("fine-tuned")
    for saved in (moved(model), tokenizer):
        saved.save_pretrained(folder)
    return folder


def page_runs(page):
    return page not in ELSEWHERE and any(block.reason is None for block in CODE[page])


@pytest.mark.parametrize("page", [page for page in CODE if CODE[page]])
def test_code_of_a_page_names_what_is_there(page):
    for block in CODE[page]:
        assert block.language in CHECKS, f"{block.place}: {block.language}"
        assert block.reason is None or block.reason in REASONS, f"{block.place}: {block.reason}"
        assert not (wrong := CHECKS[block.language](block.text)), f"{block.place}: {wrong}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_lines_have_the_options_that_they_show(page):
    for command in blocks.inline_commands(ROOT / page):
        assert not blocks.unknown_in_shell(command), f"{page}: {command}"


@pytest.mark.parametrize("page, test", ELSEWHERE.items())
def test_a_page_that_is_left_out_here_is_run_elsewhere(page, test):
    assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::safedelta_hf.errors.SafeDeltaWarning")
@pytest.mark.parametrize("page", [page for page in CODE if page_runs(page)])
def test_code_of_a_page_runs(page, fine_tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    lay_out(tmp_path, fine_tuned, "".join(block.text for block in CODE[page]))
    names = {"__name__": "page"}
    for block in CODE[page]:
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if block.reason is None and block.language == "python":
            blocks.run_python(block, names, PREPARED)
        elif block.reason is None and block.language == "bash":
            monkeypatch.chdir(blocks.run_shell(block, tmp_path))


def test_what_does_not_exist_is_found(tmp_path):
    wrong = "from safedelta_hf import Ridge, Nothing\nRidge(strenght=1.0)\nRidge(strength=1.0)"
    assert blocks.unknown_in_python(wrong) == ["safedelta_hf.Nothing", "Ridge(strenght=)"]
    shell = "safedelta apply --base A \\\n  --tuned B --outptu C && safedelta repair --all | other --flag\nother --help"
    assert blocks.unknown_in_shell(shell) == ["safedelta apply --outptu", "safedelta repair"]
    page = tmp_path / "page.md"
    page.write_text("* a\n\n    <!-- not run: needs a GPU -->\n    ```bash\n    ls\n    ```\n\n```python\n1\n```\n")
    assert [(one.language, one.reason, one.line) for one in blocks.blocks_of(page)] == [
        ("bash", "needs a GPU", 4),
        ("python", None, 8),
    ]
    failing = blocks.Block(page, "bash", "python -c 'raise KeyError(3)'", 1)
    with pytest.raises(AssertionError, match="KeyError: 3"):
        blocks.run_shell(failing, tmp_path)


# What the pages take for granted: the reader's models, files and arguments, as small as they can be.


def lay_out(folder, tuned, code):
    """Folders and files that the pages speak of."""
    for name in ("base-model", "my-base-model", "aligned-model", "base", "BASE"):
        (folder / name).symlink_to(ALIGNED_MODEL)
    for name in ("tuned-model", "tuned", "TUNED", "adjusted"):
        (folder / name).symlink_to(tuned)
    if "--tuned tuned-adapter" in code:
        prepared_profile("safety").save(folder / "profile")
        tiny_adapter().save_pretrained(folder / "tuned-adapter")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "my_scores.py").write_text("def right(response, row):\n    return row['answer'] in response\n")
    files = {
        "refusals": safety_data(24),
        "harmful": [question_row(question) for question in attack_questions(8)],
        "benign": [question_row(question) for question in skill_questions(4, skills=("make",))],
        "harmless": [question_row(question) for question in skill_questions(8, seed=3, skills=("make",))],
        "normal": [question_row(question) for question in skill_questions(48, skills=("make",))],
        "malicious": safety_data(48),
        "task": [question_row(question) for question in new_skill_questions(4)],
        "questions": [question_row(question) for question in new_skill_questions(4)],
        "ordinary": ordinary_data(24),
        "train": CASES["mixed"].examples()[:24],
    }
    for name, rows in files.items():
        if f"--output {name}.jsonl" in code:
            continue  # the page makes it
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def question_row(question):
    return {"messages": list(question.messages), "answer": question.answer}


def moved(model):
    return tiny.perturbed(model, seed=1)


@cache
def prepared_profile(kind):
    rows, config = (safety_data(24), None) if kind == "safety" else (few_examples(), ProfileConfig(holdout=0.0))
    model, tokenizer = load_aligned()
    return collect_profile(model, rows, tokenizer, config=config, progress=False)


def tiny_adapter():
    model = get_peft_model(load_aligned()[0], LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(ALIGNED_MODEL)
    return model


def few_examples():
    return CASES["benign"].examples()[:24]


def arguments():
    settings = {"per_device_train_batch_size": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(output_dir="out", max_steps=4, disable_tqdm=True, **settings)


PREPARED = {
    "model": lambda: load_aligned()[0],
    "base": lambda: load_aligned()[0],
    "tuned": lambda: moved(load_aligned()[0]),
    "adjusted": lambda: moved(load_aligned()[0]),
    "tokenizer": lambda: load_aligned()[1],
    "refusals": lambda: safety_data(24),
    "ordinary": lambda: ordinary_data(24),
    "examples": few_examples,
    "data": lambda: Dataset.from_list(tokenize(few_examples(), load_aligned()[1])),
    "dataset": lambda: preference_pairs(4),
    "args": arguments,
    "training_arguments": arguments,
    "profile": lambda: prepared_profile("safety"),
    "task": lambda: prepared_profile("task"),
    "rule": lambda: Ridge(strength=1.0),
    "score": lambda: final_answer,
    "chats": lambda: [list(question.messages) for question in attack_questions(2)],
    "batch": lambda: load_aligned()[1](["user make a cake"], return_tensors="pt"),
    "queries": lambda: ["how do i make a bomb ?", "how do i make a cake ?"],
    "unsafe": lambda: [True, False],
    "categories": lambda: ["weapons", None],
    "replies": lambda: ["i cannot help with that .", None],
    **{name: partial(getattr, safedelta_hf, name) for name in safedelta_hf.__all__},
    "Guard": lambda: Guard,
    "Trainer": lambda: Trainer,
    "DataCollatorForSeq2Seq": lambda: DataCollatorForSeq2Seq,
    "LoraConfig": lambda: LoraConfig,
    "get_peft_model": lambda: get_peft_model,
    "SFTTrainer": lambda: import_module("trl").SFTTrainer,
}
"""What a block may use without having made it, made anew for each page."""
