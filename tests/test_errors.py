"""What other libraries raise is told by a named error of this package, with its cause."""

import inspect
import warnings

import pytest
import torch

from safedelta_hf import (
    Ridge,
    SafeDeltaCallback,
    adjust_adapter,
    adjust_adapter_files,
    adjust_model,
    adjust_saved,
    refactor_adapter,
)
from safedelta_hf.errors import (
    AdjustmentError,
    ConfigurationError,
    CoverageError,
    DataError,
    SafeDeltaWarning,
    foreign_errors_named,
    naming_foreign_errors,
    warn,
)


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


@pytest.mark.parametrize(
    "function", [adjust_model, adjust_adapter, adjust_adapter_files, adjust_saved, refactor_adapter]
)
def test_arguments_that_a_function_does_not_take_are_a_type_error_of_its_own(function):
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'strength'|missing a required"):
        function(strength=1.0)
    with pytest.raises(TypeError, match="too many positional arguments"):
        function(*range(20))


def test_an_error_shows_a_glimpse_of_a_long_value():
    rows = [{"messages": [{"role": "user", "content": "how do i " * 20}] * 4}] * 99
    with pytest.raises(ConfigurationError, match="must be a rule") as raised:
        SafeDeltaCallback(Ridge(), rows)
    assert len(str(raised.value)) < 200


def test_what_a_function_raises_is_named_and_its_signature_stays():
    @naming_foreign_errors("halving")
    def halved(number: float) -> float:
        return 1 / (number - 1)

    assert halved(3) == 0.5 and str(inspect.signature(halved)) == "(number: float) -> float"
    with pytest.raises(AdjustmentError, match="ZeroDivisionError while halving"):
        halved(1)
