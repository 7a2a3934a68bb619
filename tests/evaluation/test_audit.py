"""An audit finds what the base refuses, names what it cannot judge, and goes on after a kill to the same file."""

import json

import pytest

from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.openings import asked, refusal_probabilities
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import ConfigurationError, DataError, OutputError
from safedelta_hf.evaluation import audit as module
from safedelta_hf.evaluation import audit_data
from safedelta_hf.records.sorting import Outcome
from safedelta_hf.testbed import CASES, load_aligned, safety_data
from safedelta_hf.testbed.language import things_of
from tests.fixtures import tiny

ROWS = CASES["mixed"].examples(0)[:60]
HARMFUL = {thing.name for thing in things_of("attack")}
SETTINGS = {"batch_size": 2, "progress": False}


@pytest.fixture(scope="module")
def loaded():
    return load_aligned()


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "audit.jsonl"
    return audit_data(loaded[0], ROWS, safety_data(32), loaded[1], output=output, **SETTINGS), output.read_bytes()


def test_the_harmful_rows_are_those_that_the_base_would_refuse(whole):
    found, content = whole
    expected = [n for n, row in enumerate(ROWS) if HARMFUL.intersection(row["messages"][-2]["content"].split())]
    assert sorted(one.row for one in found.refused) == expected and found.contested == found.refused
    assert found.share == len(expected) / 60 and found.outcome is Outcome.SORTED
    lines = [json.loads(line) for line in content.decode().splitlines()]
    assert [line["row"] for line in lines] == list(range(60)) and lines[3]["place"] == "row 3"
    assert f"the base would refuse {len(expected)}, of which the data answers {len(expected)}" in found.summary()


def test_probabilities_are_those_of_one_prompt_at_a_time(loaded, whole):
    sequences = read_safety_data(ROWS, loaded[1])
    questions = asked(sequences, read_safety_data(safety_data(32), loaded[1]), loaded[1])
    expected = refusal_probabilities(ShardedModel(loaded[0]), questions.prompts, questions.openings, batch_size=1)
    assert [one.probability for one in whole[0].rows] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("parts", [0, 1])
def test_an_audit_that_broke_off_goes_on_and_ends_the_same(loaded, whole, tmp_path, monkeypatch, parts):
    output, ask, calls = tmp_path / "audit.jsonl", module.refusal_probabilities, []

    def interrupted(model, prompts, *arguments, **settings):
        if len(calls) == parts:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return ask(model, prompts, *arguments, **settings)

    monkeypatch.setattr(module, "refusal_probabilities", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit_data(loaded[0], ROWS, safety_data(32), loaded[1], output=output, **SETTINGS)
    assert not output.exists()
    monkeypatch.setattr(module, "refusal_probabilities", lambda *a, **k: calls.append(len(a[1])) or ask(*a, **k))
    found = audit_data(loaded[0], ROWS, safety_data(32), loaded[1], output=output, **SETTINGS)
    assert sum(calls) == 60  # nothing was read twice
    assert found == whole[0] and output.read_bytes() == whole[1]
    assert [path.name for path in tmp_path.iterdir()] == ["audit.jsonl"]


def test_what_was_begun_with_something_else_is_not_gone_on_with(loaded, tmp_path, monkeypatch):
    output = tmp_path / "audit.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            audit_data(loaded[0], ROWS[:4], safety_data(32), loaded[1], output=output, **SETTINGS)
    with pytest.raises(OutputError, match="made with other data"):
        audit_data(loaded[0], ROWS[:5], safety_data(32), loaded[1], output=output, **SETTINGS)
    with pytest.raises(OutputError, match="made with other model"):
        audit_data(tiny.perturbed(load_aligned()[0]), ROWS[:4], safety_data(32), loaded[1], output=output, **SETTINGS)
    output.write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        audit_data(loaded[0], ROWS[:4], safety_data(32), loaded[1], output=output, **SETTINGS)
    assert output.read_text() == "precious"


def test_rows_that_cannot_be_judged_are_named_with_the_reason(loaded):
    refusal = safety_data(1)[0]
    rows = [
        refusal,
        {"messages": ROWS[0]["messages"][:-1]},
        {"text": "how do i make a cake ?"},
        {"prompt": "how do i make a cake ?"},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]},
        {"prompt": "make " * 260, "completion": "sure"},
        {"input_ids": [5, 60_000, 7], "labels": [-100, -100, 7]},
        {"prompt": "a", "completion": "b", "label": False},
        ROWS[0],
    ]
    found = audit_data(loaded[0], rows, safety_data(32), loaded[1], **SETTINGS)
    assert [one.row for one in found.judged] == [0, 8]
    reasons = [one.reason for one in found.rows]
    for row, part in enumerate(
        ["", "assistant turn", "cannot be told", "no response", "missing", "takes 256", "60000", "undesirable", ""]
    ):
        assert (part in reasons[row]) if part else not reasons[row], reasons[row]
    assert [one.row for one in found.refused] == [0] and not found.contested and found.share == 0
    assert "Not judged: 1 rows, such as row 1" in found.summary()


def test_where_much_is_refused_the_summary_says_what_it_looks_like(loaded, monkeypatch):
    harmful = audit_data(loaded[0], CASES["harmful"].examples(0)[:40], safety_data(64), loaded[1], **SETTINGS)
    assert harmful.outcome is Outcome.HARMFUL and "the data looks harmful" in harmful.summary()
    monkeypatch.setattr(module, "refusal_probabilities", lambda model, prompts, *_, **__: [0.9] * len(prompts))
    skill = audit_data(loaded[0], CASES["skill"].examples(0)[:40], safety_data(64), loaded[1], **SETTINGS)
    assert skill.outcome is Outcome.OVER_REFUSAL and "seems to refuse too much" in skill.summary()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ConfigurationError, "batch_size"),
        ({"safety_dataset": [{"text": "i cannot"}]}, ConfigurationError, "how a refusal begins"),
        ({"safety_dataset": []}, DataError, "safety data: it is empty"),
        ({"task_dataset": "nowhere.jsonl"}, DataError, "task data: there is no file"),
        (
            {"task_dataset": [{"a": "b"}] * 3},
            DataError,
            "none of its 3 rows can be judged, such as row 0: has",
        ),
    ],
)
def test_what_cannot_be_audited_is_a_named_error(loaded, changes, error, message):
    given = {
        "task_dataset": ROWS[:3],
        "safety_dataset": safety_data(8),
        "processing_class": loaded[1],
        **SETTINGS,
    } | changes
    with pytest.raises(error, match=message):
        audit_data(loaded[0], **given)
