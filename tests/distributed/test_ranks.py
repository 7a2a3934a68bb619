import signal

import pytest

from tests.programs.launching import aborted, forked, passes, torchrun


@pytest.mark.parametrize("processes", [2, 3])
def test_slices_of_a_delta_are_adjusted_as_the_whole_is(processes):
    assert "compared 16 layouts" in passes("tests.programs.deltas", processes=processes)


def test_a_rank_that_fails_is_heard_by_all_and_leaves_them_in_step():
    assert "all in step" in passes("tests.programs.failing")


def test_a_rank_that_fails_inside_a_librarys_collectives_ends_the_run():
    done = torchrun("tests.programs.failing", "alone", timeout=300)  # a rank that waited would do so for hours
    assert done.returncode != 0
    assert "lost in a forward pass" in done.stderr


def test_forked_processes_end_with_the_one_that_fails_first():
    done = forked("tests.programs.failing", "alone", timeout=60)
    assert done.returncode == 1 and "lost in a forward pass" in done.cause
    assert forked("tests.programs.none").returncode == 1


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("terminate called without an active exception\n", True),
        ("Traceback (most recent call last)\nterminate called without an active exception\n", False),
        ("double free or corruption\n", False),
        ("terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  op.preamble\n", False),
    ],
)
def test_only_what_neither_python_nor_a_collective_explains_is_run_again(said, again):
    assert aborted(-signal.SIGABRT, said) is again
    assert not aborted(1, said)
