"""The bounds of time and memory that bad inputs are held to are bounds."""

import re
import time

import pytest
import torch

from safedelta_hf.errors import AdjustmentError, ConfigurationError
from tests.bad_inputs import right_or_named


def refuse():
    raise ConfigurationError("this is refused")


def test_what_ends_right_and_what_is_refused_by_name_is_returned():
    assert right_or_named(lambda: 3) == 3
    assert isinstance(right_or_named(refuse), ConfigurationError)


def test_an_error_of_another_kind_goes_through():
    with pytest.raises(ZeroDivisionError):
        right_or_named(lambda: 1 / 0)


def test_what_computes_without_end_is_stopped():
    with pytest.raises(AssertionError, match=r"0\.1 s of CPU"):
        right_or_named(lambda: re.match("(a+)+$", "a" * 40 + "b"), seconds=0.1)


def test_what_waits_without_end_is_stopped():
    with pytest.raises(AssertionError, match=r"took over 0\.12 s"):
        right_or_named(lambda: time.sleep(60), seconds=0.01)


def test_what_swallows_errors_is_stopped_all_the_same():
    def swallow():
        while True:
            try:
                re.match("(a+)+$", "a" * 40 + "b")
            except Exception:
                continue

    with pytest.raises(AssertionError, match="of CPU"):
        right_or_named(swallow, seconds=0.1)


@pytest.mark.parametrize("take", [lambda: bytearray(1 << 30), lambda: torch.ones(1 << 28)])
def test_memory_that_is_not_to_be_had_is_no_excuse(take):
    def excused():
        try:
            take()
        except (MemoryError, RuntimeError) as error:
            raise AdjustmentError("a file could not be read") from error

    with pytest.raises(AssertionError, match="took over 64 MiB"):
        right_or_named(excused, megabytes=64)
    with pytest.raises((MemoryError, RuntimeError)):
        right_or_named(take, megabytes=64)
