"""Named causes of failure. Every message says what is wrong, where, and what to do."""

import functools
import inspect
import math
import reprlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Made = TypeVar("Made")


class SafeDeltaError(Exception):
    """Any failure that this package reports on purpose."""

    def at(self, place: str) -> "SafeDeltaError":
        """Name the place, once it is known, where the failure arose.

        Args:
            place: Canonical parameter or module name.

        Returns:
            The same class of error with the place in front of its message.
        """
        return type(self)(f"{place}: {self}")


class SafeDeltaWarning(UserWarning):
    """Something was done that its user has to know of."""


def warn(message: str) -> None:
    """Warn of something that the user has to know of, by the name of the module that calls this.

    Python's own `warnings.warn` would show a line of code below, which tells a user nothing.

    Args:
        message: What it is.
    """
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None, "CPython has frames"
    own = frame.f_back.f_globals
    registry = own.setdefault("__warningregistry__", {})  # by which the same warning is not shown again
    warnings.warn_explicit(message, SafeDeltaWarning, own["__name__"], frame.f_back.f_lineno, registry=registry)


class ConfigurationError(SafeDeltaError, ValueError):
    """An argument has a value that cannot be used."""


class DataError(SafeDeltaError, ValueError):
    """The safety data cannot be read as conversations with a response."""


class NothingLeftError(DataError):
    """The base would refuse every example of a task, so there is no task to protect.

    Args:
        message: What was found.
        sorting: The same as a record, where it is at hand.
    """

    def __init__(self, message: str, sorting: object = None) -> None:
        super().__init__(message)
        self.sorting = sorting


class CaptureError(SafeDeltaError, RuntimeError):
    """The moments of a layer could not be collected."""


class ArchitectureError(SafeDeltaError, ValueError):
    """A model is not built as is needed: its decoder layers, or parts of them, are not found."""


class NumericalError(SafeDeltaError, ArithmeticError):
    """A tensor holds NaN or Inf, or a matrix cannot be factorised."""


class FactorisationError(NumericalError):
    """A matrix cannot be factorised, at the strength or damping at which it was made."""


class BaseWeightsError(SafeDeltaError, RuntimeError):
    """The base (aligned) weights are unknown, unreadable or not the expected ones."""


class ProfileError(SafeDeltaError, ValueError):
    """A safety profile is malformed or was made for something else."""


class OutputError(SafeDeltaError, OSError):
    """A place cannot be written: taken, being written by another process, begun by a run of something else, or full."""


class AdapterError(SafeDeltaError, ValueError):
    """An adapter has no delta that can be adjusted, or is not as it has to be."""


class CheckpointError(SafeDeltaError, ValueError):
    """A folder of model weights is malformed, cannot be adjusted file by file, or cannot be written."""


class MergeError(SafeDeltaError, ValueError):
    """A further model that a merge needs cannot be read, or does not belong to the same base."""


class AdjustmentError(SafeDeltaError):
    """Something outside this package failed while it was at work; the cause is chained.

    No `RuntimeError`, so that `auto_find_batch_size` does not take memory running out here for a batch that is too
    large, and trains a finished model again.
    """


class RestoreError(AdjustmentError):
    """Weights that were written over could not be put back, so the model holds neither one thing nor the other."""


class EvaluationError(SafeDeltaError):
    """Something outside this package failed while a model was evaluated; the cause is chained.

    No `RuntimeError`, for the same reason as `AdjustmentError`.
    """


class RankError(SafeDeltaError):
    """Another process of the run failed; its message is told."""


class CoverageError(SafeDeltaError, ValueError):
    """Trained parameters lie outside what the method can adjust."""


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 1


def shown(value: object) -> str:
    """A value as an error shows it: of what is within it, a glimpse.

    Args:
        value: Any value.

    Returns:
        Text of some words.
    """
    return _SHORT.repr(value)


def require_kind(owner: str, setting: str, value: object, kinds: type | tuple[type, ...], told: str) -> None:
    """Stop at an argument of another kind than can be used, before anything is done with it.

    Args:
        owner: What has the argument.
        setting: Its name.
        value: Its value.
        kinds: What it may be.
        told: That in words.

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(value, kinds):
        if isinstance(value, type):
            name = value.__name__
            raise ConfigurationError(f"{owner}: {setting}={name} is a class and must be {told}; pass {name}(...)")
        raise ConfigurationError(f"{owner}: {setting}={shown(value)} must be {told}")


def is_number(value: object) -> bool:
    """Whether a setting is a real number, and one that a float can hold.

    Args:
        value: Any value.

    Returns:
        Whether it is; neither a truth value nor NaN is one.
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        return False


def how_to_install(extra: str) -> str:
    """Say how the packages of an extra are installed: no index has this package, so its repository is needed.

    Args:
        extra: Name of the extra.

    Returns:
        The command, and where it is run.
    """
    return f'pip install -e ".[{extra}]" in a clone of this package\'s repository'


@contextmanager
def extra_needed(purpose: str, extra: str) -> Iterator[None]:
    """Say how a package is installed that is missing.

    Args:
        purpose: What it is needed for, and its name.
        extra: The extra of this package that brings it.

    Yields:
        Nothing.

    Raises:
        ConfigurationError: What is imported within is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(f"{purpose} ({error}); {how_to_install(extra)}") from error


def figures_needed() -> AbstractContextManager[None]:
    """Say how matplotlib is installed, if it is missing.

    Returns:
        A context to import it in.
    """
    return extra_needed("figures are drawn with matplotlib", "plot")


@contextmanager
def foreign_errors_named(
    stage: str, advice: str = "the weights are as they were", kind: type[SafeDeltaError] = AdjustmentError
) -> Iterator[None]:
    """Turn what other libraries raise into an error of ours; a `RuntimeError` would make Trainer train again.

    Args:
        stage: What is being done.
        advice: What is known then, or what to do.
        kind: Class of the error, no `RuntimeError`.

    Yields:
        Nothing.

    Raises:
        SafeDeltaError: As it was raised, or of that kind, with what was raised as its cause.
    """
    try:
        yield
    except SafeDeltaError:
        raise
    except Exception as error:
        raise kind(f"{type(error).__name__} while {stage} ({_told(error)}); {advice}") from error


def naming_foreign_errors(
    stage: str, advice: str = "the weights are as they were"
) -> Callable[[Callable[Given, Made]], Callable[Given, Made]]:
    """Turn what other libraries raise in a function into an `AdjustmentError`.

    Args:
        stage: What the function does.
        advice: What is known if it fails, or what to do.

    Returns:
        A decorator. Arguments that the function does not take are a `TypeError`, as of any other.
    """

    def decorated(function: Callable[Given, Made]) -> Callable[Given, Made]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*arguments: Given.args, **settings: Given.kwargs) -> Made:
            signature.bind(*arguments, **settings)
            with foreign_errors_named(stage, advice):
                return function(*arguments, **settings)

        return called

    return decorated


def _told(error: BaseException) -> str:
    # What an error says, and, where it wraps another that says more, the one that it came from.
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    said = str(error) or "no message"
    return said if root is error or str(root) in said else f"{said}, because of {type(root).__name__}: {root}"
