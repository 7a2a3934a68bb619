"""Rows with what their teachers predict: the right ones, from the right teacher, weighed as is said."""

import pytest
import torch

from safedelta_hf.core.divergence import divergence, targets_of
from safedelta_hf.data.dataset import SafetySequence, read_safety_data
from safedelta_hf.data.forms import IGNORED
from safedelta_hf.distributed.model import ShardedModel
from safedelta_hf.polish import lessons as module
from safedelta_hf.polish.lessons import aside, batch_loss, collated, curriculum, divergences, lessons_of
from tests.fixtures import tiny


def prompted(count, seed):
    """Rows of unequal lengths, whose first two tokens are the prompt."""
    return [
        SafetySequence(input_ids=row.input_ids, labels=(IGNORED,) * 2 + row.labels[2:])
        for row in read_safety_data(tiny.rows(count, seed=seed))
    ]


def logits_alone(model, row):
    """The oracle: one row without padding, the predictions of its response tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([row.input_ids])).logits[0, 1:-1]


@pytest.fixture(params=[1024, 0], ids=["whole", "likeliest"])
def taught(request, monkeypatch, llama):
    monkeypatch.setattr(module, "EXACT", request.param)
    found = lessons_of(ShardedModel(llama), "task", prompted(6, 1), prompted(3, 2), top_k=5)
    return llama, [*found.taught["task"], *found.held_out["task"]], None if request.param else 5


def test_a_lesson_is_what_the_teacher_says_of_the_response(taught):
    teacher, lessons, kept = taught
    assert [lesson.sequence for lesson in lessons] == prompted(6, 1) + prompted(3, 2)
    for lesson in lessons:
        expected = targets_of(logits_alone(teacher, lesson.sequence), kept)
        torch.testing.assert_close(torch.from_numpy(lesson.log_probs), expected.log_probs, rtol=1e-4, atol=1e-5)
        assert (lesson.tokens is None) == (kept is None)
        assert lesson.tokens is None or lesson.tokens.tolist() == expected.tokens.tolist()


def test_the_loss_of_a_padded_batch_is_the_mean_over_rows_of_their_means(taught):
    teacher, lessons, kept = taught
    student = tiny.perturbed(tiny.llama(), scale=0.1)
    expected = [
        divergence(logits_alone(student, one.sequence), targets_of(logits_alone(teacher, one.sequence), kept)).mean()
        for one in lessons
    ]
    assert divergences(ShardedModel(student), lessons) == pytest.approx([float(one) for one in expected], rel=1e-3)
    batch = collated([lessons[:4], lessons[4:]])
    with torch.no_grad():
        logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = batch_loss(logits[batch["labels"][:, 1:] != IGNORED], batch)
    assert float(loss) == pytest.approx(float(sum(expected) / len(expected)), rel=1e-4)


def test_each_item_has_a_row_of_each_kind_and_rows_come_equally_often(llama):
    rows = lessons_of(ShardedModel(llama), "task", prompted(5, 1), [], top_k=5).taught["task"]
    drawn = curriculum({"refusals": rows[:3], "task": rows[3:], "ordinary": ()}, 12)
    assert len(drawn) == 12 and all(item[0] in rows[:3] and item[1] in rows[3:] and len(item) == 2 for item in drawn)
    assert {sum(one in item for item in drawn) for one in rows[:3]} == {4}


def test_rows_that_are_held_out_are_not_taught():
    for rows in (prompted(40, 3), [SafetySequence(input_ids=(5, n), labels=(IGNORED, n)) for n in range(6, 30)]):
        used, held_out = aside([*rows, *rows[:4]], 0.125)
        assert len(held_out) in range(1, 12)
        assert not set(used) & set(held_out)
        assert set(used) | set(held_out) == set(rows)
