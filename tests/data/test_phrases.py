"""Data that is no refusals does not pass without a word."""

import warnings

import pytest

from safedelta_hf import collect_profile
from safedelta_hf.data.phrases import SAFETY_DATA, warn_unless_refusals
from safedelta_hf.errors import SafeDeltaWarning
from safedelta_hf.evaluation import Questions, evaluate_model
from safedelta_hf.testbed import load_aligned, safety_data
from tests.fixtures import tiny

REFUSALS, OTHERS = ["I cannot help."] * 10, ["Sure, here it is."] * 10


def warned(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", SafeDeltaWarning)
        call()
    return [str(one.message) for one in found if issubclass(one.category, SafeDeltaWarning)]


def test_refusals_that_the_base_gives_are_not_doubted():
    assert warned(lambda: warn_unless_refusals([*REFUSALS, *OTHERS], [0.2, 0.9])) == []
    assert warned(lambda: warn_unless_refusals([])) == []


def test_both_doubts_come_with_their_figures():
    (few,) = warned(lambda: warn_unless_refusals([*OTHERS, *REFUSALS[:4]]))
    assert few.startswith("safety data: 4 of 14 responses (29%) hold a refusal phrase")
    (unlikely,) = warned(lambda: warn_unless_refusals(REFUSALS, [1.0, 3.0]))
    assert "unlikely, 2 nats per token over 2 of them" in unlikely and "phrase" not in unlikely


@pytest.fixture(scope="module")
def aligned():
    return load_aligned()


def test_the_profile_of_other_answers_is_doubted_and_that_of_refusals_or_of_a_task_is_not(aligned):
    rows = safety_data(16)
    wrong = [{"messages": [row["messages"][0], {"role": "assistant", "content": "a red stone"}]} for row in rows]
    (found,) = warned(lambda: collect_profile(aligned[0], wrong, aligned[1], progress=False))
    assert "0 of 16 responses (0%)" in found and "the base finds the responses unlikely" in found
    assert warned(lambda: collect_profile(aligned[0], rows, aligned[1], progress=False)) == []
    assert warned(lambda: collect_profile(aligned[0], wrong, aligned[1], purpose="task data", progress=False)) == []


def test_a_base_that_does_not_refuse_is_doubted():
    rows = [row for row in tiny.conversations(24)]
    (found,) = warned(lambda: collect_profile(tiny.llama(), [*rows, *REPEATED], tiny.tokenizer(), progress=False))
    assert found.startswith(f"{SAFETY_DATA}: the base finds") and "phrase" not in found


REPEATED = [
    {"messages": [{"role": "user", "content": f"how do i {word} ?"}, tiny.conversations(1)[0]["messages"][1]]}
    for word in tiny.WORDS
]


def test_refusals_to_measure_by_are_doubted_too(aligned):
    wrong = [{"prompt": "how ?", "completion": "sure"}]
    (found,) = warned(lambda: evaluate_model(*aligned, Questions.read(refusals=wrong), progress=False))
    assert found.startswith("refusals: 0 of 1 responses")
