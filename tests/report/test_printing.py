"""What is shown to people keeps within a terminal, and is whole where there is none."""

import os

import pytest
from rich.table import Column, Table

from safedelta_hf.report.printing import PARAMETER, Foldable, printed

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


def test_without_a_terminal_nothing_is_folded(monkeypatch):
    def none(*_):
        raise OSError

    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", none)
    text = printed("", SENTENCE, table())
    assert NAME in text and "[x]" in text and SENTENCE.rstrip() in text
    assert max(map(len, text.splitlines())) < 3 * len(NAME) and not text.startswith("\n")
