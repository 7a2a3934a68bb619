import json
from xml.etree import ElementTree

import pytest

from safedelta_hf.evaluation.board import Board, judged
from safedelta_hf.evaluation.board.texts import as_values, junit, markdown, printable, table
from tests.evaluation.board.results import evaluation, saved


@pytest.fixture
def board(tmp_path):
    values = {"aligned": [0] * 20, "tuned": [1] * 18 + [0] * 2, "adjusted": [1] + [0] * 19}
    losses = {"aligned": [0.1] * 5 + [0.2] * 5, "tuned": [3.0] * 10, "adjusted": [0.1] * 10}
    found = {n: evaluation(n, attack_success=values[n], refusal_nll=losses[n]) for n in values}
    return Board.read({name: saved(tmp_path / name, one) for name, one in found.items()})


def test_table_and_markdown_hold_every_figure(board):
    verdicts = [judged("attack_success > aligned + 0.01", board), judged("refusal_nll > 1", board)]
    for text in (table(board, verdicts, width=200), markdown(board, verdicts)):
        for part in (
            "5.0% (0.9% to 23.6%)",
            "90.0%",
            "tuned - aligned",
            "+90.0 points",
            "< 0.001",
            "18 / 0 of 20",
            "p is how often",
            "6 tests were made",
            "FAILED: adjusted fails if attack_success > aligned + 0.01 (adjusted.attack_success 5.0%",
            "passed: adjusted fails if refusal_nll > 1",
        ):
            assert part in " ".join(text.split()), part


def test_differences_of_all_scores_are_in_the_markdown_alone(board):
    assert "-2.9 nats/token" in markdown(board) and "-2.9 nats/token" not in table(board, width=200)


def test_plain_values_are_json_and_hold_tests_and_verdicts(board):
    found = json.loads(json.dumps(as_values(board, [judged("attack_success > 0.01", board)])))
    assert found["subject"] == "adjusted" and [one["name"] for one in found["results"]] == list(board.names)
    assert found["gates"][0]["fails"] and len(found["differences"]) == 6
    assert found["differences"][0]["p_value"] == pytest.approx(2 / 2**18)
    assert "values" not in found["results"][0]


def test_junit_has_a_test_for_each_condition(board):
    verdicts = [judged("attack_success >\faligned + 0.01", board), judged("refusal_nll > 1", board)]
    root = ElementTree.fromstring(junit(board, verdicts).encode())
    assert (root.get("tests"), root.get("failures")) == ("2", "1")
    failed, passed = root.iter("testcase")
    assert "attack_success" in failed.find("failure").get("message") and passed.find("failure") is None
    assert passed.get("name") == "not (refusal_nll > 1)" and passed.get("classname") == "safedelta.adjusted"


def test_what_no_xml_can_hold_is_replaced():
    assert printable("a\x00b\ud800c\x85\ufffe\td\ne\u202e") == "a\ufffdb\ufffdc\ufffd\ufffd\td\ne\u202e"
