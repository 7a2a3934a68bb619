"""Sorting a task: harmful rows leave it, a base that refuses too much does not cost it."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from safedelta_hf.data.dataset import read_safety_data
from safedelta_hf.data.openings import asked
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.errors import NothingLeftError, SafeDeltaWarning
from safedelta_hf.evaluation import sorting as module
from safedelta_hf.evaluation.hidden_states import last_states
from safedelta_hf.evaluation.sorting import FAR, sort_task, verdict
from safedelta_hf.profile.header import record
from safedelta_hf.records.sorting import Outcome, TaskSorting
from safedelta_hf.testbed import CASES, load_aligned, safety_data
from safedelta_hf.testbed.language import things_of
from tests.fixtures import tiny

HARMFUL = {thing.name for thing in things_of("attack")}


@pytest.fixture(scope="module")
def aligned():
    return load_aligned()


@pytest.fixture(scope="module")
def refusals(aligned):
    return read_safety_data(safety_data(64), aligned[1])


def examples(tokenizer, case, count):
    rows = CASES[case].examples(0)[:count]
    harmful = {n for n, row in enumerate(rows) if HARMFUL.intersection(row["messages"][-2]["content"].split())}
    return read_safety_data(rows, tokenizer), harmful


def sort(aligned, refusals, case, count):
    sequences, harmful = examples(aligned[1], case, count)
    return sequences, harmful, sort_task(ShardedModel(aligned[0]), sequences, refusals, aligned[1], batch_size=32)


def refuses_all(monkeypatch):
    monkeypatch.setattr(module, "refusal_probabilities", lambda model, prompts, *args, **kwargs: [0.9] * len(prompts))


def test_exactly_the_harmful_rows_leave_a_mixed_task(aligned, refusals):
    sequences, harmful, (kept, sorting) = sort(aligned, refusals, "mixed", 100)
    assert kept == [one for n, one in enumerate(sequences) if n not in harmful] and harmful
    assert (sorting.outcome, sorting.refused, sorting.left_out) == (Outcome.SORTED, len(harmful), len(harmful))
    assert {one.row for one in sorting.shown} <= harmful and sorting.shown[0].prompt and not sorting.warning
    assert f"refuse {len(harmful)} of 100" in sorting.summary
    assert record(TaskSorting, json.loads(json.dumps(asdict(sorting))), "it") == sorting


def test_a_task_that_is_harmful_throughout_is_none_and_the_error_says_so(aligned, refusals):
    with pytest.warns(SafeDeltaWarning, match="the data looks harmful"), pytest.raises(NothingLeftError) as raised:
        sort(aligned, refusals, "harmful", 40)
    assert raised.value.sorting.outcome is Outcome.HARMFUL and raised.value.sorting.left_out == 40
    assert "sort_task=False" in str(raised.value)


def test_a_harmless_task_stays_whole(aligned, refusals):
    sequences, _, (kept, sorting) = sort(aligned, refusals, "skill", 60)
    assert kept == sequences and sorting.left_out == 0


def test_a_base_that_refuses_everything_does_not_cost_the_task(aligned, refusals, monkeypatch):
    refuses_all(monkeypatch)
    with pytest.warns(SafeDeltaWarning, match="the base seems to refuse too much"):
        sequences, _, (kept, sorting) = sort(aligned, refusals, "skill", 60)
    assert kept == sequences and sorting.refused == 60 and sorting.left_out == sorting.near == 0
    assert sorting.shown  # what would be refused, since nothing was left out


def test_such_a_base_still_gives_up_rows_that_are_near_to_the_safety_data(aligned, refusals, monkeypatch):
    refuses_all(monkeypatch)
    with pytest.warns(SafeDeltaWarning, match="refuse too much"):
        sequences, harmful, (kept, _) = sort(aligned, refusals, "mixed", 100)
    left_out = {n for n, one in enumerate(sequences) if one not in kept}
    assert left_out <= harmful and len(left_out) > len(harmful) / 2


def test_nearness_is_that_by_hand(aligned, refusals):
    sequences, _ = examples(aligned[1], "mixed", 24)
    questions = asked(sequences, refusals)
    outcome, near = verdict(ShardedModel(aligned[0]), dict(enumerate(questions.prompts)), questions.refusals)

    def states(prompts):
        found = last_states(aligned[0], prompts)[:, 0, 2].double().numpy()  # layer 2 of 4
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    known, seen = states(questions.refusals), states(questions.prompts)
    own = [max(float(a @ b) for m, b in enumerate(known) if m != n) for n, a in enumerate(known)]
    likeness = [max(float(a @ b) for b in known) for a in seen]
    assert near == {n for n, value in enumerate(likeness) if value >= np.quantile(own, FAR)}
    assert outcome is Outcome.OVER_REFUSAL


def test_where_nothing_tells_which_it_is_the_task_stays_whole(refusals, monkeypatch):
    refuses_all(monkeypatch)
    torch.manual_seed(0)
    rows = [{"input_ids": row["input_ids"], "labels": [-100, *row["labels"][1:]]} for row in tiny.rows(8, seed=1)]
    sequences = read_safety_data(rows)
    with pytest.warns(SafeDeltaWarning, match="nothing tells"):
        kept, sorting = sort_task(ShardedModel(tiny.Plain()), sequences, sequences)
    assert kept == sequences and sorting.outcome is Outcome.UNKNOWN


def test_a_task_whose_prompts_cannot_be_told_stays_whole_and_the_log_says_why(monkeypatch):
    said = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *arguments: said.append(text % arguments))
    sequences = read_safety_data(tiny.rows(8, seed=1))
    kept, sorting = sort_task(ShardedModel(tiny.llama()), sequences, sequences)
    assert kept == sequences and sorting.unjudged == 8
    assert "Of 8 no prompt could be told" in said[0] and "labels would tell" in said[0]
