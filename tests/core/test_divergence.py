"""Divergence of a student from what was kept of its teacher, against sums over the whole vocabulary in float64."""

import math

import pytest
import torch

from safedelta_hf.core.divergence import divergence, targets_of

VOCABULARY = 11


@pytest.fixture
def logits():
    teacher, student = torch.randn(5, VOCABULARY) * 4, torch.randn(5, VOCABULARY) * 4
    teacher[1] = torch.linspace(0, 300, VOCABULARY)  # all but certain
    return teacher, student


def by_sums(teacher, student):
    found = []
    for one, other in zip(teacher.double().tolist(), student.double().tolist(), strict=True):
        of_all = [math.log(sum(math.exp(x - max(row)) for x in row)) + max(row) for row in (one, other)]
        logs = [(a - of_all[0], b - of_all[1]) for a, b in zip(one, other, strict=True)]
        found.append(sum(math.exp(p) * (p - q) for p, q in logs))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("kept", [None, VOCABULARY, VOCABULARY + 3])
def test_all_tokens_kept_is_the_divergence_over_the_vocabulary(logits, kept):
    teacher, student = logits
    found = divergence(student, targets_of(teacher, kept))
    torch.testing.assert_close(found.double(), by_sums(teacher, student), rtol=1e-5, atol=1e-5)


def test_the_likeliest_tokens_and_the_rest_bound_it_from_below_and_ever_closer(logits):
    teacher, student = (one.double() for one in logits)
    whole, below = by_sums(teacher, student), torch.zeros(5, dtype=torch.float64)
    for kept in range(1, VOCABULARY):
        found = divergence(student, targets_of(teacher, kept))
        assert (found >= below - 1e-9).all()
        below = found
    assert (below <= whole + 1e-9).all()
    # With all but one kept, the rest is that one.
    torch.testing.assert_close(below, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [None, 3])
def test_a_student_equal_to_its_teacher_is_at_zero_and_stays(logits, kept):
    student = logits[0].clone().requires_grad_()
    loss = divergence(student, targets_of(logits[0], kept)).sum()
    (slope,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-6
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("kept", [None, 3])
def test_the_slope_is_that_of_differences(logits, kept):
    teacher, student = (one[:1].double() for one in logits)
    targets = targets_of(teacher, kept)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, targets), student, atol=1e-6)


def test_tokens_that_the_teacher_never_says_count_nothing(logits):
    teacher, student = logits
    teacher[:, 0] = -torch.inf
    for kept in (None, 3):
        assert divergence(student, targets_of(teacher, kept)).isfinite().all()
