"""What is shown to people keeps within a terminal, and is whole where there is none."""

import os

import pytest
from rich.table import Column, Table

from safedelta_hf.report.printing import SENTENCES, printed

NAME = "base_model.model.model.layers.*.self_attn.q_proj.lora_A.default.weight" * 3
SENTENCE = "so it was done " * 30


def table():
    shown = Table(*(Column(head, overflow="fold") for head in ("a", "b")), title="[Title]")
    shown.add_row(NAME, "[x]")
    return shown


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_no_line_is_longer_than_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert max(map(len, printed(SENTENCE, table()).splitlines())) <= columns
    assert max(map(len, printed(SENTENCE, table(), width=columns // 2).splitlines())) <= columns // 2


def test_without_a_terminal_no_name_is_folded_and_sentences_are_broken_between_words(monkeypatch):
    def none(*_):
        raise OSError

    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", none)
    text = printed("", SENTENCE, table())
    assert NAME in text and "[x]" in text and "".join(SENTENCE.split()) in "".join(text.split())
    assert max(len(line) for line in text.splitlines() if "so it was" in line) <= SENTENCES
    assert max(map(len, text.splitlines())) < 2 * len(NAME) and not text.startswith("\n")
