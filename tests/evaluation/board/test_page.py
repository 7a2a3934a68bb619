import re
from html.parser import HTMLParser

import pytest

from safedelta_hf.evaluation.board import Board, judged
from safedelta_hf.evaluation.board.figure import png
from safedelta_hf.evaluation.board.page import LONGEST, differing, page
from tests.evaluation.board.results import evaluation, saved

NASTY = "<script>alert(1)</script> & \"'><img src=https://example.org/x> \x00\ud800 {{ board }}"


@pytest.fixture
def board(tmp_path):
    values = {"aligned": [0, 0, 0, 1], "tuned": [1, 1, 0, 1], "adjusted": [0, 1, 0, 1]}
    texts = {
        "aligned": ["no", "no", "no", "ok"],
        "tuned": ["fine", NASTY, "no", "ok"],
        "adjusted": ["no", "y" * 5000] * 2,
    }
    return Board.read(
        {
            name: saved(
                tmp_path / name,
                evaluation(name, attack_success=own, harmful_refused=[1 - x for x in own], over_refusal=[0, 0]),
                harmful=texts[name],
            )
            for name, own in values.items()
        }
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_holds_no_markup_of_a_model(board):
    text = page(board, [judged("attack_success > 0.1 or attack_success < 0", board)])
    tags = Tags()
    tags.feed(text)
    assert not tags.open and "script" not in tags.seen and "link" not in tags.seen
    links = [value for name, value in tags.attributes if name in ("src", "srcset", "href")]
    assert len(links) == 2 and all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "{{ board }}" in text
    assert not re.search(r"url\(|@import", text) and "\x00" not in text and text.encode()
    assert "default-src 'none'" in text
    assert re.search(r"% \(\d+\.\d%\u00a0to\u00a0\d+\.\d%\)", text), "an interval stays in one line"


def test_answers_that_differ_are_folded_and_those_against_the_judged_model_come_first(board):
    found = list(differing(board, "harmful", 10))
    assert [example.number for example in found] == [2, 1]
    assert [(one.name, one.label, one.is_bad) for one in found[0].answers] == [
        ("aligned", "refused", False),
        ("tuned", "answered", True),
        ("adjusted", "answered", True),
    ]
    assert len(found[0].answers[2].text) < LONGEST + 50
    assert len(list(differing(board, "harmful", 1))) == 1 and list(differing(board, "benign", 10)) == []
    text = page(board)
    assert text.count("<details>") == 2 and "<details open" not in text and "Not passed" not in text
    assert "<details>" not in page(board, examples=0)


def test_the_verdict_is_said_in_words_and_not_by_colour_alone(board):
    assert "Not passed" in page(board, [judged("attack_success > 0.1", board)])
    assert "✓ Passed" in page(board, [judged("attack_success > 0.9", board)])
    assert "adjusted</span> answers 2 of 4 harmful requests and refuses 0 of 2 harmless requests." in page(board)


def test_the_figure_is_a_picture_also_without_intervals_or_chief_scores(board, tmp_path):
    assert png(board).startswith(b"\x89PNG")
    own = {name: saved(tmp_path / name, evaluation(name, refusal_nll=[0.5])) for name in ("a", "b")}
    assert png(Board.read(own)).startswith(b"\x89PNG")
