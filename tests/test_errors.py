"""What other libraries raise is told by a named error of this package, with its cause."""

import warnings

import pytest
import torch

from safedelta_hf.errors import AdjustmentError, CoverageError, DataError, SafeDeltaWarning, foreign_errors_named, warn


def test_foreign_errors_get_a_name_and_own_ones_keep_theirs():
    with pytest.raises(CoverageError, match="^mine$"), foreign_errors_named("adjusting"):
        raise CoverageError("mine")
    with pytest.raises(KeyboardInterrupt), foreign_errors_named("adjusting"):
        raise KeyboardInterrupt
    with (
        pytest.raises(AdjustmentError, match=r"^OutOfMemoryError while adjusting \(full\); all is well$") as raised,
        foreign_errors_named("adjusting", "all is well"),
    ):
        raise torch.OutOfMemoryError("full")
    assert not isinstance(raised.value, RuntimeError) and isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(
        AdjustmentError, match=r"RuntimeError while reading \(it broke, because of KeyError: 'id'\); the"
    ):
        with foreign_errors_named("reading"):
            raise RuntimeError("it broke") from KeyError("id")
    with pytest.raises(AdjustmentError, match=r"\(no message\)"), foreign_errors_named("reading"):
        raise StopIteration
    with pytest.raises(DataError, match="ValueError while reading"), foreign_errors_named("reading", kind=DataError):
        raise ValueError


def test_a_warning_names_the_module_that_warns_and_shows_no_code(recwarn):
    for _ in range(2):  # where it is shown at all, it is shown once for each place
        warn("look")
    told = recwarn[0]
    assert told.category is SafeDeltaWarning and told.filename == __name__
    shown = warnings.formatwarning(told.message, told.category, told.filename, told.lineno)
    assert shown.count("\n") == 1 and shown.endswith("SafeDeltaWarning: look\n")
