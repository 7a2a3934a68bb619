"""What is shown to people keeps within a terminal, and is whole where there is none."""

import os
from pathlib import Path

import pytest
from rich.table import Column, Table

from safedelta_hf.report.printing import PARAMETER, Foldable, printed, written

NAME = "base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight" * 3
SENTENCE = "so it was done " * 30


def table():
    shown = Table(*(Column(head, overflow="fold") for head in ("a", "b")), title="[Title]")
    shown.add_row(NAME, "[x]")
    return shown


@pytest.mark.parametrize("columns, lines", [(36, 2), (60, 1)])
def test_a_name_is_folded_after_its_dots(columns, lines):
    name = "model.layers.*.post_attention_layernorm.weight"
    shown = Table(box=None, show_header=False)
    shown.add_row(Foldable(name, PARAMETER))
    found = [line.strip() for line in printed(shown, width=columns).splitlines()]
    assert "".join(found) == name and len(found) == lines
    assert all(part.endswith(".") for part in found[:-1])


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_longer_than_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, printed(SENTENCE, table()).splitlines())) <= columns
    assert max(map(len, printed(SENTENCE, table(), width=columns // 2).splitlines())) <= columns // 2


@pytest.mark.parametrize("columns", [20, 40, 80])
@pytest.mark.parametrize(
    "whole",
    [
        "/home/somebody/a-model_that.is-fine-tuned/on-their-own-data/" * 3,
        "'/home/some body/with blanks in it/as people have'",
        '"safedelta profile --model BASE --safety-data refusals.jsonl"',
        "`pip install -e '.[plot]' in a clone`",
        "--safety-data",
    ],
)
def test_a_path_and_a_command_stay_in_one_piece(columns, whole):
    text = f"The users' model doesn't fit: {whole}, so give another; it's said in\n  row 5: {whole} was read"
    found = printed(text, width=columns)
    assert found.count(whole) == 2 and found.replace("\n", " ").split() == text.split()
    assert all(len(line) <= columns or whole in line for line in found.splitlines())
    assert "\n  row 5:" in found and "\n\n" not in found


def test_what_was_written_is_one_to_a_line():
    paths = [Path("out") / name for name in ("a.json", "b c.json")]
    assert written(*paths, note=" (2 files)") == "Written: out/a.json\n         out/b c.json (2 files)"


def test_without_a_terminal_nothing_is_folded(monkeypatch):
    def none(*_):
        raise OSError

    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", none)
    text = printed("", SENTENCE, table())
    assert NAME in text and "[x]" in text and SENTENCE.rstrip() in text
    assert max(map(len, text.splitlines())) < 3 * len(NAME) and not text.startswith("\n")
